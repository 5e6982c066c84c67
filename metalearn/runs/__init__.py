"""The machinery of a run: configuration, training, evaluation, checkpoints, tracking. Parts are imported by name."""
