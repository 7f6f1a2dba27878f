"""Attention with relu features, linear in the number of tokens."""
