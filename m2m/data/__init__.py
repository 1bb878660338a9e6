"""Reading what the project learns from: captions, shards of image sets, and the layouts that users bring.

Belongs here: on-disk layouts, splits, orders. Not here: anything that runs a model (`m2m.generation`).
"""
