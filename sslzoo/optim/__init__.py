"""Optimisers, and learning-rate and EMA schedules as functions of the step."""
