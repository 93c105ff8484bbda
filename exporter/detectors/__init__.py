"""Detectors: checkpoint → one graph that takes pictures and gives boxes → detector bundle."""
