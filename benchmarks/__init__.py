"""How fast the backend is, beside two others and the limit: ``python -m benchmarks``."""
