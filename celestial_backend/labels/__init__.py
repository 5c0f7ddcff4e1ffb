"""
The room of the label config: which choices a project asks for, and how they and a model's classes find each other.

In goes a label config, and what a model knows; out come regions for probabilities, and choices for regions. What
Label Studio's editor would not show, or not take, is never predicted. Folders name choices too, those that pictures
are sorted into. Nothing here reads a picture, asks anybody, or keeps a state.
"""

from celestial_backend.labels.config import LabelConfig, loose, read, short, some, value_of
from celestial_backend.labels.controls import UNKNOWN_SCORE, Columns, Control
from celestial_backend.labels.folders import Sorted, by_class, files_in
from celestial_backend.labels.mapping import CONTROLS_MAX, KEYS_MAX, ChoiceMap, Vocabulary

__all__ = [
    "CONTROLS_MAX",
    "KEYS_MAX",
    "UNKNOWN_SCORE",
    "ChoiceMap",
    "Columns",
    "Control",
    "LabelConfig",
    "Sorted",
    "Vocabulary",
    "by_class",
    "files_in",
    "loose",
    "read",
    "short",
    "some",
    "value_of",
]
