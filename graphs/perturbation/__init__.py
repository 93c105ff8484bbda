"""The query perturbation in three forms: oracle (eigendecomposition), placeholder (for tracing) and lowering."""
