"""
Work that lasts: trainings, and pages of predictions, from the request to the end, whatever is killed in between.

In goes a request for a project; out comes a job that is run once, by one worker, and whose state, progress and
result can be asked for at any time. The ledger is the one truth. Nothing here knows how a model learns, and what
learns knows nothing of jobs: the process of a training joins the two.
"""
