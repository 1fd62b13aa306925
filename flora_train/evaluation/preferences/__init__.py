"""Rewards of held-out preferences: types, and their computation from log-probabilities."""
