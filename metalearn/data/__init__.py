"""Episodes from class-indexed uint8 images; import from the submodules, as ``metadata`` needs no torch."""
