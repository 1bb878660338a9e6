"""Pre-training on MIS and task-specific fine-tuning (the paper's section 6).

Belongs here: the objective, the loop, its checkpoints, the two stages. Not here: models, data on disk, sampling.
"""
