"""Running experiments: run directory, processes, signals, training, evaluation and exit."""
