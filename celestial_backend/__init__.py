"""A Label Studio ML backend that pre-labels images with a BentoML-packaged Keras classifier."""

__version__ = "0.2.0"
