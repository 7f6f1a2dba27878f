"""Linear layer and cross-entropy over labelled rows; logits are never stored whole."""
