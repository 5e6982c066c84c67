"""Other libraries' meta-gradients, to be compared with; each module needs its library, which the core does not."""
