"""Masked squared error of a velocity prediction: loss and gradient in one pass."""
