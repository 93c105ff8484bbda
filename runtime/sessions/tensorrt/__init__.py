"""Compiled engines: the libraries that build and run them, and the sessions over them."""
