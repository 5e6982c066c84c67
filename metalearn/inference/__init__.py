"""Load a trained run, adapt it to new classes, and predict."""
