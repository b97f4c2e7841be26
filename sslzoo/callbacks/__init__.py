"""Callbacks of the training, each with one purpose and independent of the method."""
