"""MetAug (arXiv:2203.05119): contrastive learning with additional features from learned generators."""
