"""Evaluation of frozen features: linear probe, k-NN and baselines."""
