"""The benchmark beside other libraries: who takes part, on what, how fast, and how cost grows."""
