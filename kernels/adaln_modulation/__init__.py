"""Adaptive layer norm: norm, scale and shift before a sub-layer, gate and residual after it."""
