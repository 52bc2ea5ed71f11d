"""Figures like the paper's: networks, faces and inversions (models.py), layout (grid.py), the figures (plots.py)."""
