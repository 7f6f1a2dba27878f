"""Layers that several families share; each file stands alone."""
