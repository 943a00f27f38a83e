"""Data of the systems: labelled files, and raw text as packed blocks."""
