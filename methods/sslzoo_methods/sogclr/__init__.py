"""SogCLR (arXiv:2202.12387): a global contrastive objective with small batches."""
