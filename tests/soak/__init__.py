"""Hostile inputs by the thousand: only a `QpertError` may come of them. `make soak`; a short run is in the suite."""
