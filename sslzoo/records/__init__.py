"""Run directories: written and locked by a run, read by everything that shows runs."""
