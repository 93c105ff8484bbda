"""One folder for each model family: its network as plain torch modules."""
