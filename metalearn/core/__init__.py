"""What every package builds on: types, models as pure functions, errors, serialization and profiling."""
