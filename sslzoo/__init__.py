"""Self-supervised pre-training on images, with reproducible results."""

__version__ = "0.1.0"
