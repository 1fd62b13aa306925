"""Recipes and `key=value` overrides, read into one validated, frozen configuration."""
