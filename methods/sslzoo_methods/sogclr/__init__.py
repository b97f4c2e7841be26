"""SogCLR (arXiv:2202.12387): global contrastive learning with small batches."""
