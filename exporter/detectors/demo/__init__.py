"""The files of the demonstration's detector, as transformers saves one: config.json, model.safetensors and
preprocessor_config.json, with a card. It has seen nothing but the generated scenes of `qpert.runtime.scenes`.
"""
