"""Lessons on second and higher derivatives, one module each; ``python scripts/gradients.py`` runs them."""
