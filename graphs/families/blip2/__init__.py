"""BLIP-2: vision towers, Q-Former, and the retrieval model with its stages."""
