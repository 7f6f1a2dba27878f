"""AdamW over flattened groups: clipping, update, average and rounding in one pass."""
