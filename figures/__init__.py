"""Figures: each a function from rows to a picture. Nothing here imports torch."""
