"""Checkpoint files, opened and read tensor by tensor."""
