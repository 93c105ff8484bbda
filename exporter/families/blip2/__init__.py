"""BLIP-2 image-text retrieval: LAVIS and Hugging Face checkpoints."""
