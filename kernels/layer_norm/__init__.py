"""LayerNorm of a residual stream, with the adds before it and the rounding after it."""
