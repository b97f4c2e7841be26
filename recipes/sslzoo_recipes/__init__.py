"""Bundled recipes: one complete experiment a file."""
