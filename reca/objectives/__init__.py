"""Objectives: (prediction, target, draws) -> a sum."""
