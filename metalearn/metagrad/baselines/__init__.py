"""Other ways to the meta-gradient, to be compared with: other libraries, which the core does not need, and by hand."""
