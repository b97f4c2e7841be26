"""MetAug (arXiv:2203.05119): contrastive learning with features that are made, by generators that are learnt."""

from sslzoo_methods.metaug.config import MetAugConfig as Config

__all__ = ["Config"]
