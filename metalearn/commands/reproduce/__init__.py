"""Reproduce published rows: train seed by seed, within a time limit, and compare with the published accuracies."""
