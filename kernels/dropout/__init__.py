"""Dropout of packed rows whose mask is regenerated, never stored, with an optional residual add."""
