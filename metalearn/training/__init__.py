"""Meta-training: the loop, its state, checkpoints and evaluation."""
