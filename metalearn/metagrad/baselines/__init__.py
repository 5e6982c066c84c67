"""Baselines: the meta-gradient by other libraries (``PEERS``), which the core does not need, or by a hand-written loop.

A *backend* is a library that computes the meta-gradients of a whole training.
"""
