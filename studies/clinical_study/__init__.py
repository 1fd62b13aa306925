"""Baselines and comparison runs of recipe=clinical, and the table with them and the run's adapters."""
