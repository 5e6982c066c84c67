"""The pages of the documentation; ``blocks`` writes their tables and numbers."""
