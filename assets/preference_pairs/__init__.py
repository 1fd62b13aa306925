"""Pairs of sampled programs for the same problem: one passes its tests, the other does not."""
