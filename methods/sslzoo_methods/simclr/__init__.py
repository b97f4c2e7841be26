"""SimCLR (arXiv:2002.05709): the baseline, and the example for new methods."""
