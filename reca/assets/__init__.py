"""Data that ships with reca: photographs, prompts and the quickstart's starting weights."""
