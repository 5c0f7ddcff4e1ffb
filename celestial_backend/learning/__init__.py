"""
Labels to heads: what people said of a project's pictures, made into a model that says it of the others.

In go the tasks of a project (or a folder of pictures, one sub-folder a class) and the live model; out comes a
model of heads, judged on labels that it did not learn, and the reason why it was published or not. One training
reads, learns, compares and saves, in this order: `project`. Nothing here answers a request, and nothing knows
of jobs: whoever asks for a training is told where it is, and what came of it.
"""
