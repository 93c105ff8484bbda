"""Perturbation hyper-parameters by grid search, and ranges for quantisation (not built yet)."""
