"""Sampling: images from the images before them. Not here: networks (models) and learning (training)."""
