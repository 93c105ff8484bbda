"""CLIP: two towers that meet in one dot product."""
