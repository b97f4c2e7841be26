"""A run around its training: its directory, its processes, how it is asked to leave and how it ends."""
