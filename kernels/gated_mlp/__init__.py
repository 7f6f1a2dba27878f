"""SwiGLU on fused gate-and-up rows, alone and with the projection that follows it."""
