"""Measure memory, time, operations and hardware."""
