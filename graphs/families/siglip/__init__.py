"""SigLIP: two towers, the image pooled by one query, which boxes may perturb."""
