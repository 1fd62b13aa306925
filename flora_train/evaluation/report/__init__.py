"""The report of a run: its typed content (types.py), pages, terminal output and the files that hold them."""
