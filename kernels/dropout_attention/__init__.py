"""Self-attention of packed samples with dropout of its probabilities; nothing of their size is stored."""
