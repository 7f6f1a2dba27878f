"""RMSNorm, optionally after a residual add."""
