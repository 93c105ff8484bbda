"""Names that the lowering of a query map gives to what it adds. Those who operate on exported graphs look for them."""

PREFIX = "query_map"
"""Nodes and initializers of the first query map are called `query_map/…`, of the second `query_map_1/…`."""

THRESHOLD = "threshold"
"""The initializer `query_map/threshold` is τ and may be overwritten."""
