"""Distances between images: LPIPS and features, face identity, image metrics."""
