"""The configuration: schema, validation and composition. Imports no torch."""
