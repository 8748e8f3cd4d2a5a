"""Runs and measures: config in, records out."""
