"""Settings of a bundle from data: perturbation hyper-parameters by grid search, INT8 and FP8 ranges."""
