"""Trained models as files, and those that are shipped."""
