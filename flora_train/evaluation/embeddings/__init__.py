"""Figures of held-out embeddings."""
