"""Recipes of compression passes make variants of every student and of its control."""
