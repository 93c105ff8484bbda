"""Two-stage BLIP-2 retrieval without PyTorch."""
