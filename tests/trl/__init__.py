"""Comparisons with TRL, which runs in an environment of its own (`make trl-env`)."""
