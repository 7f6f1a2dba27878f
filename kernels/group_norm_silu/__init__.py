"""GroupNorm and the SiLU after it, as the encoders of image tokenizers have them."""
