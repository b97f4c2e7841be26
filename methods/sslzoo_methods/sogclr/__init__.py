"""SogCLR (arXiv:2202.12387): a global contrastive objective with small batches."""

from sslzoo_methods.sogclr.config import SogCLRConfig as Config

__all__ = ["Config"]
