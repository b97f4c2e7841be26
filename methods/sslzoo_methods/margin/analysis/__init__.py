"""Analysis of the effect that margins have, or would have, on any contrastive method (arXiv:2306.11526)."""
