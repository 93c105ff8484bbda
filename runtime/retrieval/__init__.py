"""Images and texts to features and scores."""
