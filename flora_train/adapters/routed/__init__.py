"""Routed adapters: a router, or gate, chooses the experts that compute a token."""
