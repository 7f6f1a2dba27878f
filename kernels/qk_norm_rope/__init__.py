"""Fused qkv rows to attention layout: per-head RMSNorm of query and key, rotary embedding, placement."""
