"""References that an exported bundle is compared with."""
