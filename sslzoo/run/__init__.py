"""The life of a run around its training: where it lives, who belongs to it, how it is asked to leave and how it ends."""
