"""CoCa from open_clip checkpoints."""
