"""SigLIP, and SigLIP 2 of fixed resolution, from Hugging Face folders."""
