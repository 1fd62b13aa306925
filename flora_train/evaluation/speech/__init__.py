"""How many words does a speech model get wrong? Transcription with mixed adapters, normalisers, error rates, comparison."""
