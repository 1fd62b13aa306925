"""Figures of predictions: computed from predictions and references, with bootstrap intervals."""
