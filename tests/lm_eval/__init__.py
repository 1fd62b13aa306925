"""Comparisons with lm-evaluation-harness, an optional package (`make test-lm-eval`)."""
