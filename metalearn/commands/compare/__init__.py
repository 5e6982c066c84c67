"""Several variants of a training over several seeds: launched, gathered, and reported side by side."""
