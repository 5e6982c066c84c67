"""The configuration: schema, validation and composition. Imports no torch, but for a set of torchvision."""
