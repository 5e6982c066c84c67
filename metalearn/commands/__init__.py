"""The commands of ``metalearn``: a file or a folder each."""
