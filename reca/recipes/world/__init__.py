"""The miniature world: its stages, what post-training adds in each arm of the study, and the exact scores."""
