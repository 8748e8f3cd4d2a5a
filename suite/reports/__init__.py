"""Judges: records in, tables, figures and claims out."""
