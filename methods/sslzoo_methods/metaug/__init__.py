"""MetAug (arXiv:2203.05119): contrastive learning with features that are made, by generators that are learnt."""
