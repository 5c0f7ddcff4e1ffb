"""
The room of the celestial bodies: the default model, and all that can make it again.

In go folders of pictures or numbers to draw from; out come pictures of bodies, a network with its
preprocess and postprocess, its figures and its card. Nothing here knows Label Studio, settings or
the BentoML store, and nothing outside needs to know what a planet looks like.
"""
