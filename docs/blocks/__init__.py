"""The blocks of the documentation that are written by a program: figures, tables, keys and commands."""
