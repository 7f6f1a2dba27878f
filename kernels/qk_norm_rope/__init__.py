"""Fused qkv rows to attention layout: per-head norm of query and key, rotary embedding, placement."""
