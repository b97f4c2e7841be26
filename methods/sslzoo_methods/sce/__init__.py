"""SCE (arXiv:2111.14585): soft contrastive learning with a momentum encoder and a queue."""
