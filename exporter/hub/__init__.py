"""What lies beside the weights of a two-tower model in a Hugging Face folder: architecture, image processor, names."""
