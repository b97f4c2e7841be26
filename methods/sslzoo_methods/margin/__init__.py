"""Margins in contrastive learning (arXiv:2306.11526): margins on the positive pairs, or their separate effects."""
