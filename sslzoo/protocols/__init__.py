"""Linear evaluation by named protocols."""
