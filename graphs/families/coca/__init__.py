"""CoCa: two towers, the image pooled by one learned query, which boxes may perturb."""
