"""Diffusion with learned variance: noised rows, and the whole objective with its gradient in one pass."""
