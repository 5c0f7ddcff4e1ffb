"""The compose files on a real Docker engine: `pytest -m docker -n 0`, as docs/contributing.md tells."""
