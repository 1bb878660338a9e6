"""Making data with pretrained models: image sets from captions, features from images, and the noise both start from.

Belongs here: running Stable Diffusion and DINOv2 over data. Not here: how the results lie on disk (`m2m.data`).
"""
