"""Scores on one model, shadow models, statistics, and the quality of pictures."""
