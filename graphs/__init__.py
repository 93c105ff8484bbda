"""BLIP-2 retrieval as plain torch modules made to be exported, the query perturbation, and the graph passes."""
