"""Preferences: pairs of a chosen and a rejected completion, and completions that are labelled good or bad."""
