"""Training and evaluating a recipe, trying it out, and measuring its speed."""
