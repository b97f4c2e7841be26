"""What frozen features are worth: linear probe, k-NN and their baselines."""
