"""What Weights & Biases and TensorBoard show of a run."""
