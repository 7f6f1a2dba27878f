"""Depthwise 3x3 convolution and gated linear unit, with the SiLU before them."""
