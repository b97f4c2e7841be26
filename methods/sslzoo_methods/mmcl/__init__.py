"""MMCL: Max-Margin Contrastive Learning (arXiv:2112.11450)."""
