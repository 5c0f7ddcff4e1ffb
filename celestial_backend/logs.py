"""What the process writes to its log, set once by each entry point."""

from __future__ import annotations

import logging
import os


def configure(level: str) -> None:
    """
    Log lines of this level and above to stderr, and quieten the libraries.

    Libraries log headers and addresses at DEBUG, tokens included, so theirs never
    go below INFO. TensorFlow and BentoML read the environment when
    they are imported, so this must come first.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=level, force=True)
    for name in ("httpx", "httpcore", "urllib3", "PIL", "h5py", "tensorflow", "bentoml"):
        logging.getLogger(name).setLevel(max(logging.INFO, logging.getLevelName(level)))
