"""The query perturbation three ways: oracle (eigendecomposition), placeholder (what tracing leaves) and lowering."""
