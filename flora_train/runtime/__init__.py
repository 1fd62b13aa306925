"""Processes, progress, signals, the run folder, journals and atomic writes."""
