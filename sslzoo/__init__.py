"""Self-supervised image pre-training whose numbers can be believed."""

__version__ = "0.1.0"
