"""
Models: what is served, where it is kept, and which one is live for a project.

In go tags, files of models and pictures; out come probabilities and features. A model is a network with its custom
objects (`classifier`), or heads on features (`headed`); `registry` is the folder of BentoML's store, and `kept` brings
there what other machines have trained. `pointers` says which tag is live, `store` keeps the loaded ones, `standalone`
writes one to a file. What a model says of its making is its `manifest`.
Custom objects run code when they are read, so `saved` is the only place that reads them. Nothing here asks Label
Studio, or reads a task.
"""
