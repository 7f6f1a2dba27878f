"""Bias and activation between the two products of an MLP, alone and with the products."""
