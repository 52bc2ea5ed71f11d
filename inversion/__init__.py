"""Inversion by optimisation: images to w and noise maps."""
