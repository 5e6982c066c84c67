"""The foundations of every package: types, models as pure functions, errors, serialization and profiling."""
