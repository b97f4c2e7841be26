"""MMCL: Max-Margin Contrastive Learning (arXiv:2112.11450)."""

from sslzoo_methods.mmcl.config import MMCLConfig as Config

__all__ = ["Config"]
