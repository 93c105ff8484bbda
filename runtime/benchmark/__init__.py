"""How fast a bundle is: every graph and both directions end to end, beside baselines measured in the same minutes."""
