"""The engine: steps, optimizer, run loop and checkpoints; it knows no model."""
