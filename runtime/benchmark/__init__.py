"""How fast a bundle is: every graph and both directions end to end, next to baselines measured at the same time."""
