"""Final norm, projection to a velocity, and its masked squared error: loss and gradient in one pass."""
