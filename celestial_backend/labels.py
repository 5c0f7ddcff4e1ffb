"""
Label config ↔ model classes, both ways.

`ChoiceMap.from_config` reads a label config once: which Choices are on which Image,
under which key a task keeps that picture, and which choice stands for which class.
Then `prediction` turns probabilities into regions, and `classes_of` turns the regions
of an annotation back into classes. A *choice* is Label Studio's word, spelled as the
config spells it (its alias, or else its value); a *class* is the model's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from textwrap import shorten
from types import MappingProxyType
from typing import Any

from celestial_backend.errors import FetchError, LabelConfigError, ModelError
from celestial_backend.label_config import ChoicesTag, image_of, loose, match, read, short, some

DEFAULT_THRESHOLD = 0.5
SMALL_CHARS = 100_000  # of a config of which many are remembered; of larger ones, two
CONTROLS_MAX, KEYS_MAX = 200, 16  # of a config that are served; each task has an answer of one, a picture of the other
MAX_WARNINGS = 20  # each becomes a line in the log, and a config may have thousands of controls
MAX_MESSAGE_CHARS = 400  # it may become the reason phrase of an HTTP status line

@dataclass(frozen=True)
class ChoiceControl:
    """
    One Choices tag that the model serves.

    Attributes:
        data_key: Where a task keeps the picture: "image", or dotted, "data.image.url".
        threshold: The least probability to be predicted, or None if the config gives none.
        choices: All choices on offer, in the config's order and spelling.
        choice_of: Class -> choice, at least one, in the model's order.
        class_of: Choice -> class, the way back; of several classes the choice's namesake.
    """

    from_name: str
    to_name: str
    data_key: str
    multiple: bool
    threshold: float | None
    choices: tuple[str, ...]
    choice_of: Mapping[str, str] = field(hash=False)
    class_of: Mapping[str, str] = field(hash=False)

    def choose(self, probability_of: Mapping[str, float]) -> tuple[list[str], float]:
        """Return the choices to predict, best first, none to abstain, and the best probability."""
        ranked = sorted(self.choice_of, key=lambda name: -probability_of[name])
        least = DEFAULT_THRESHOLD if self.threshold is None else self.threshold
        chosen = [name for name in ranked if probability_of[name] >= least]
        if not chosen and self.threshold is None:
            chosen = ranked[:1]
        choices = list(dict.fromkeys(self.choice_of[name] for name in chosen))
        return choices if self.multiple else choices[:1], probability_of[ranked[0]]


@dataclass(frozen=True)
class ChoiceMap:
    """
    The choices of a label config, matched with the classes of a model.

    Never changes after it is made; any number of threads may share it.

    Attributes:
        classes: The model's classes, in the order of its probabilities.
        controls: The Choices tags that the model serves, at least one.
        warnings: Sentences about what the model will not predict, for the log.
    """

    classes: tuple[str, ...]
    controls: tuple[ChoiceControl, ...]
    warnings: tuple[str, ...]

    @classmethod
    def from_config(cls, label_config: str, classes: Sequence[str]) -> ChoiceMap:
        """
        The map for a label config and the classes of a model; the last few are remembered.

        Raises:
            LabelConfigError: The config is not XML, has no Choices on an Image that can be
                served, or none of its choices is a class. One line, at most 400 characters.
        """
        if not isinstance(label_config, str):
            raise LabelConfigError(f"The label config must be XML text, got {type(label_config).__name__}.")
        known = _choice_map if len(label_config) <= SMALL_CHARS else _large_choice_map
        return known(label_config, tuple(classes))

    @classmethod
    def for_learning(cls, label_config: str, classes: Sequence[str]) -> ChoiceMap:
        """
        The map that reads labels to learn from: every choice on offer stands for a class.

        A choice that matches no class of the model becomes a new one, named as the config
        spells the choice, after the model's classes and in the config's order. The config
        may share no class with the model.

        Raises:
            LabelConfigError: The config is not XML, or has no Choices on an Image that can be served.
        """
        tags, images = read(label_config)
        names = dict.fromkeys(classes)
        for tag in tags:
            to_name, data_key, reason = image_of(tag, images)
            if not reason:
                control, _ = _control(tag, to_name, data_key, tuple(names))
                names |= dict.fromkeys(choice for choice in control.choices if choice not in control.class_of)
        return cls.from_config(label_config, tuple(names))

    @property
    def data_keys(self) -> tuple[str, ...]:
        """The keys under which a task keeps the pictures, each once, in the config's order."""
        return tuple(dict.fromkeys(control.data_key for control in self.controls))

    @staticmethod
    def value_of(task_data: Mapping[str, Any], data_key: str) -> object:
        """
        What a task holds under a key; a literal key with dots goes before a path.

        Raises:
            FetchError: The task has no such key.
        """
        known = task_data if isinstance(task_data, Mapping) else {}
        value: object = known
        for part in [data_key] if data_key in known else data_key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise FetchError(f"The task has no data key {short(data_key)} that the label config names; "
                                 f"it has {some(map(str, known))}.")
            value = value[part]
        return value

    def prediction(self, probabilities: Mapping[str, Sequence[float]]) -> tuple[list[dict[str, Any]], float]:
        """
        The regions of one task, and its score.

        Args:
            probabilities: Data key -> K probabilities in the order of `classes`; a control
                whose key is absent says nothing. What is not a number counts as 0.

        Returns:
            One region per control that does not abstain, and the task's score, 0 to 1. A
            control's score is the probability of its best class as the model gave it,
            whether said or not; the task's is the lowest of them, and 0 without any.

        Raises:
            ModelError: A row has not one probability per class.
        """
        regions: list[dict[str, Any]] = []
        scores: list[float] = []
        for number, control in enumerate(self.controls, 1):
            row = probabilities.get(control.data_key)
            if row is None:
                continue
            if len(row) != len(self.classes):
                raise ModelError(f"The model gave {len(row)} probabilities for its {len(self.classes)} classes.")
            chosen, score = control.choose(dict(zip(self.classes, map(_probability, row), strict=True)))
            scores.append(score)
            if chosen:
                regions.append({"id": f"choice-{number}", "from_name": control.from_name, "to_name": control.to_name,
                                "type": "choices", "value": {"choices": chosen}, "score": score})
        return regions, min(scores, default=0.0)

    def classes_of(self, result: object) -> dict[str, list[str]]:
        """
        The classes that the regions of an annotation name, by control (`from_name`).

        A choice that stands for no class is returned as it is, a new class. Regions of other
        controls or objects, and those without a choice, are passed over.
        """
        controls = {(control.from_name, control.to_name): control for control in self.controls}
        found: dict[str, list[str]] = {}
        for region in result if isinstance(result, list) else ():
            try:
                control = controls[region["from_name"], region["to_name"]]
                choices = region["value"]["choices"]
            except (KeyError, TypeError):  # another kind of region
                continue
            for choice in choices if isinstance(choices, list) else ():
                if isinstance(choice, str) and choice:
                    found.setdefault(control.from_name, []).append(control.class_of.get(choice, choice))
        return {from_name: list(dict.fromkeys(names)) for from_name, names in found.items()}


def _read_choice_map(label_config: str, classes: tuple[str, ...]) -> ChoiceMap:
    tags, images = read(label_config)
    controls: dict[str, ChoiceControl] = {}
    keys: set[str] = set()
    warnings: list[str] = []
    offered: dict[str, None] = {}
    for tag in tags:
        name = tag.attributes["name"]
        to_name, data_key, reason = image_of(tag, images)
        if not reason and (len(controls) >= CONTROLS_MAX or (data_key not in keys and len(keys) >= KEYS_MAX)):
            reason = f"{CONTROLS_MAX} controls on {KEYS_MAX} images are served, and this is one too many"
        if reason or name in controls:
            warnings.append(f"Control {short(name)} is skipped: {reason or 'another control has its name'}.")
            continue
        offered.update((choice.label, None) for choice in tag.choices)
        control, remarks = _control(tag, to_name, data_key, classes)
        warnings += [f"Control {short(name)}: {remark}." for remark in remarks]
        if control.choice_of:
            controls[name] = control
            keys.add(data_key)
    if not controls and offered:
        raise LabelConfigError(f"None of the choices {some(offered)} is a class of the model {some(classes)}. "
                               "Rename a choice or add predicted_values.")
    if not controls:
        message = " ".join(["The label config has no Choices on an Image that the model can serve.", *warnings])
        raise LabelConfigError(shorten(message, MAX_MESSAGE_CHARS, placeholder=" ..."))
    served = {name for control in controls.values() for name in control.choice_of}
    lost = [name for name in classes if name not in served]
    if lost:
        warnings.append(f"No choice stands for the classes {some(lost)}, so they are never predicted.")
    warnings[MAX_WARNINGS:] = [f"{len(warnings) - MAX_WARNINGS} more such remarks."] * (len(warnings) > MAX_WARNINGS)
    return ChoiceMap(classes, tuple(controls.values()), tuple(warnings))


_choice_map = lru_cache(maxsize=32)(_read_choice_map)
_large_choice_map = lru_cache(maxsize=2)(_read_choice_map)


def _control(tag: ChoicesTag, to_name: str, data_key: str, classes: tuple[str, ...]) -> tuple[ChoiceControl, list[str]]:
    """Return a control, matched with the classes, and what is worth a warning."""
    choice_of, remarks = match(tag.choices, classes)
    class_of: dict[str, str] = {}
    for name in sorted(choice_of, key=lambda name: (name != choice_of[name], loose(name) != loose(choice_of[name]))):
        class_of.setdefault(choice_of[name], name)
    choices = tuple(dict.fromkeys(choice.label for choice in tag.choices))
    unused = [choice for choice in choices if choice not in class_of]
    if unused:
        remarks.append(f"the model never predicts the choices {some(unused)}")
    threshold: float | None = None
    text = tag.get("model_score_threshold")
    try:
        threshold = float(text) if text else None
    except ValueError:
        threshold = -1.0
    if threshold is not None and not 0 <= threshold <= 1:
        remarks.append(f"model_score_threshold must be a number from 0 to 1, got {short(text)}; it is ignored")
        threshold = None
    return ChoiceControl(tag.attributes["name"], to_name, data_key, tag.get("choice") == "multiple", threshold, choices,
                         MappingProxyType(choice_of), MappingProxyType(class_of)), remarks


def _probability(value: object) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return 0.0 if math.isnan(number) else min(max(number, 0.0), 1.0)
