"""Perturbation settings by grid search on a validation split."""
