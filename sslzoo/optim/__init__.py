"""Optimisers, and schedules as functions of the step."""
