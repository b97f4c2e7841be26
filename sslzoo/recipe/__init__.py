"""What a person may say: the sections of a recipe, its reading, and the names that it may use. No torch."""
