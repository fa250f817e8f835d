"""Trains the small model that ships with the package; ``train.py`` is the command."""
