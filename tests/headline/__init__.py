"""The two headline recipes, run unchanged against material that is built here and served on loopback."""
