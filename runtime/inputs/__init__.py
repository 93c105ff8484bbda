"""What a user brings: pictures, texts, boxes and data sets, and what they become as inputs of the graphs."""
