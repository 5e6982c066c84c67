"""Published rows, reproduced: trained seed by seed in slices, gathered, and put beside the published figures."""
