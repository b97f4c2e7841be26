"""Margin analysis (arXiv:2306.11526): margins on the positive pair, whole or effect by effect."""
