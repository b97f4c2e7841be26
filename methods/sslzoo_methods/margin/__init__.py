"""Margin analysis (arXiv:2306.11526): margins on the positive pair, whole or effect by effect."""

from sslzoo_methods.margin.config import MarginConfig as Config

__all__ = ["Config"]
