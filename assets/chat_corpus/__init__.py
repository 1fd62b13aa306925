"""Dialogues of the PyPI package chatterbot-corpus: topics, splits and their notice."""
