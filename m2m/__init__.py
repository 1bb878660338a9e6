"""Many-to-many image generation with auto-regressive diffusion models: from captions to evaluated models."""
