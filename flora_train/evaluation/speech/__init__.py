"""Evaluation of speech tasks: transcripts, error rates and their summary."""
