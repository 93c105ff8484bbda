"""One folder for each model family that can be exported, and the table of them."""
