"""Recipes: their schema, the code that reads them, and the names they may use. Importable without torch."""
