"""Evaluation of a trained encoder, after training."""
