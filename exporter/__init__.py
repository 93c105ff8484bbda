"""From a checkpoint to a bundle: weights, tracing, graph surgery, manifest, recorded samples."""
