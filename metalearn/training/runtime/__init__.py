"""Processes, signals, precision and CUDA graphs of a training."""
