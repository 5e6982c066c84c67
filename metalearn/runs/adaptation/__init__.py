"""``scripts/adapt.py``: a trained run, adapted to a user's own folders of images."""
