"""Training-time companions of a method: each does one thing and knows no method."""
