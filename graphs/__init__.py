"""Retrieval models as plain torch modules for export, the query perturbation, and the graph passes."""
