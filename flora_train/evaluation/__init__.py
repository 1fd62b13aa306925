"""Held-out comparison with intervals, generated code, speech recognition, and the report."""
