"""CLIP from Hugging Face folders."""
