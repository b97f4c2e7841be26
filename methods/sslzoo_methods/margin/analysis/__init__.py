"""What margins do, or would do, to the embeddings of any contrastive method (arXiv:2306.11526)."""
