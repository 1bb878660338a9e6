"""The networks of M2M: what they compute and how they are saved. Not here: sampling (pipelines) and training."""
