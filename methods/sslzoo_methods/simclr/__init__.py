"""SimCLR (arXiv:2002.05709): the baseline, and the example to copy."""

from sslzoo_methods.simclr.config import SimCLRConfig as Config

__all__ = ["Config"]
