"""The paper's evaluations (sections 7.2 to 9) and the page that shows them.

Belongs here: protocols, measures, the report. Not here: models, pipelines, data sets.
"""
