"""What an exported bundle is compared with."""
