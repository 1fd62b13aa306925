"""Tasks, their sources and templates, tokenization, the task mixture and batches."""
