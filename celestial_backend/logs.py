"""What the process writes to its log, set once by each entry point."""

from __future__ import annotations

import logging
import os

LIBRARIES = dict.fromkeys(("httpcore", "urllib3", "PIL", "h5py", "bentoml"), logging.INFO)
LIBRARIES |= {"httpx": logging.WARNING, "huey": logging.WARNING, "tensorflow": logging.ERROR}


def configure(level: str) -> None:
    """
    Log lines of this level and above to stderr, and quieten the libraries.

    Libraries log headers and addresses at DEBUG, tokens included, so theirs never
    go below INFO; and some say every request or every minute at INFO. TensorFlow and
    BentoML read the environment when they are imported, so this must come first.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=level, force=True)
    for name, least in LIBRARIES.items():
        logging.getLogger(name).setLevel(max(least, logging.getLevelName(level)))
