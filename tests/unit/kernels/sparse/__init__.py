"""Sparse changes of a weight."""
