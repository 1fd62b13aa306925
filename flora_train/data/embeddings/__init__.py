"""Embeddings: pairs and triplets of texts, from which adapters learn what lies close to what."""
