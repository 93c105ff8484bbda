"""Hugging Face folders of two-tower models: configuration, tensors, tokenizer files, reference model."""
