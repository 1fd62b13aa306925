"""Builds the small code corpora in `assets/code/` from Debian packages; `build_code_corpus.py` runs it."""
