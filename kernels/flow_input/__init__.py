"""Noised latents and their projection; the noise is regenerated, never stored."""
