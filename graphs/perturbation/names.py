"""Names in the lowered query map, by which tools find it in exported graphs."""

PREFIX = "query_map"
"""Nodes and initializers of the first query map are named `query_map/…`, of the second `query_map_1/…`."""

THRESHOLD = "threshold"
"""The initializer `query_map/threshold` is τ and may be overwritten."""
