"""Episodes from class-indexed uint8 images. The parts are imported by name, as ``catalog`` needs no torch."""
