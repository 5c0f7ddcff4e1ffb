"""
What a label config says: its Choices tags, their choices, and the Image tags they are about.

Reads as Label Studio's own LabelInterface does, without its second of import time.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple
from xml.parsers import expat

from celestial_backend.errors import LabelConfigError

MAX_CHARS = 2_000_000  # of a label config; ten thousand choices have half of it
_DATA_KEY = re.compile(r"\$([^, {}]{1,1000})")  # the SDK's rule; braces are a Repeater's, and no task has such a key
_REASONS_TO_SKIP = {"model_skip": "the config says so", "perRegion": "it belongs to regions",
                    "perItem": "it belongs to the items of a list", "allowNested": "its choices are paths"}
LOOSE_MAX_CHARS = 100  # putting n accents in order takes n * n steps
_EXACT, _LOOSE = (0, 2, 3), (1, 4, 5)  # ranks of predicted_values, label and value; the lowest wins a class


class Choice(NamedTuple):
    """One choice on offer; its label is its alias, or else its value."""

    label: str
    value: str
    predicted: tuple[str, ...]


class ChoicesTag(NamedTuple):
    """One control and the choices inside it."""

    attributes: Mapping[str, str]
    choices: list[Choice]

    def get(self, key: str) -> str:
        """Return an attribute, also if spelled in lower case as the editor allows; "" without it."""
        return (self.attributes.get(key) or self.attributes.get(key.lower()) or "").strip()


def read(label_config: str) -> tuple[list[ChoicesTag], dict[str, Mapping[str, str]]]:
    """
    Return the Choices tags, and the attributes of the Image tags by name.

    Reads as Label Studio's LabelInterface does: a control has a name and a toName, tag names
    are case-sensitive, and a Choice belongs to the nearest control around it.
    """
    if len(label_config) > MAX_CHARS:
        raise LabelConfigError(f"A label config may have {MAX_CHARS:,} letters, and this one has {len(label_config):,}."
                               " Offer fewer choices.")
    tags: list[ChoicesTag] = []
    images: dict[str, Mapping[str, str]] = {}
    around: list[ChoicesTag | None] = [None]  # for each open element, the control that it lies in

    def start(element: str, attributes: dict[str, str]) -> None:
        control = around[-1]
        if attributes.get("name") and attributes.get("toName"):
            control = ChoicesTag(attributes, [])
            if element == "Choices":
                tags.append(control)
        elif element == "Image" and attributes.get("name"):
            images[attributes["name"]] = attributes
        elif element == "Choice" and control is not None and (attributes.get("alias") or attributes.get("value")):
            label = attributes.get("alias") or attributes["value"]
            predicted = tuple(part.strip() for part in attributes.get("predicted_values", "").split(","))
            control.choices.append(Choice(label, attributes.get("value", ""), predicted))
        around.append(control)

    def check_doctype(_name: str, _system: object, _public: object, declares: int) -> None:
        if declares:  # entities, and attributes that every element gets: each may grow without bound
            raise LabelConfigError("The label config declares an XML entity, attribute or element in its DOCTYPE, which"
                                   " is refused. Write the text out, and take the DOCTYPE away.")

    parser = expat.ParserCreate()  # fetches nothing, and no declaration gets past the DOCTYPE
    parser.StartElementHandler = start
    parser.EndElementHandler = lambda _: around.pop()
    parser.StartDoctypeDeclHandler = check_doctype
    try:
        parser.Parse(label_config.strip("\ufeff \t\r\n"), True)
    except (expat.ExpatError, ValueError) as error:  # ValueError: a text that UTF-8 cannot hold
        raise LabelConfigError(f"The label config is not readable XML: {error}.") from error
    return tags, images


def image_of(tag: ChoicesTag, images: Mapping[str, Mapping[str, str]]) -> tuple[str, str, str]:
    """Return the name and data key of a Choices tag's Image (the first), and the reason to skip the tag, or ""."""
    for key, reason in _REASONS_TO_SKIP.items():
        if tag.get(key).lower() == "true":
            return "", "", f"{reason} ({key})"
    if tag.get("value").startswith("$") or tag.get("apiUrl"):
        return "", "", "its choices come from the task (dynamic)"
    if not tag.choices:
        return "", "", "it offers no choice"
    to_names = tag.attributes["toName"].split(",")
    found = [name for name in to_names if name in images]
    for name in found:
        match = _DATA_KEY.fullmatch(images[name].get("value", ""))
        if match and not images[name].get("valueList"):
            return name, match[1], ""
    if found:
        return "", "", f"the Image {short(found[0])} shows a list (valueList) or has no value of the form $key"
    return "", "", f"no Image is among its toName {some(to_names)}"


def match(choices: Sequence[Choice], classes: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """
    Return class -> choice, and a remark on every class that several choices claim.

    A class looks for its choice by `predicted_values`, exactly and then without regard to
    case and blanks; by label exactly; by the value behind an alias exactly; by label and
    then by value without regard to case and blanks. The first choice found has it.
    """
    claims: dict[tuple[int, str], dict[str, None]] = {}
    place, namesakes = _index(tuple(classes))
    named: set[str] = set()
    for label, value, predicted in choices:
        for rank, names in enumerate((predicted, (label,), (value,))):
            for name in filter(str.strip, names):
                key = loose(name)
                if key in namesakes:
                    claims.setdefault((_EXACT[rank], name), {})[label] = None
                    claims.setdefault((_LOOSE[rank], key), {})[label] = None
                    named.add(key)
    rivals: dict[str, list[dict[str, None]]] = {}
    for name in sorted((name for key in named for name in namesakes[key]), key=place.__getitem__):
        found = [claims.get((rank, name if rank in _EXACT else loose(name)), {}) for rank in range(6)]
        if any(found):
            rivals[name] = [labels for labels in found if labels]
    choice_of = {name: next(iter(found[0])) for name, found in rivals.items()}
    taken = set(choice_of.values())
    remarks = []
    for name, (best, *others) in rivals.items():
        losers = [*list(best)[1:], *(label for labels in others for label in labels if label not in taken)]
        if losers:
            remarks.append(f"several choices claim the class {short(name)}; {short(choice_of[name])} has it, "
                           f"not {some(dict.fromkeys(losers))}")
    return choice_of, remarks


@lru_cache(maxsize=8)
def _index(classes: tuple[str, ...]) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Return the place of each class, and the classes by their loose name; a config may have thousands of controls."""
    place = {name: number for number, name in enumerate(classes)}
    namesakes: dict[str, list[str]] = {}
    for name in place:
        namesakes.setdefault(loose(name), []).append(name)
    return place, namesakes


def loose(name: str) -> str:
    """Return a name without regard to case, blanks and the ways to write an accent; a very long one as it is."""
    if len(name) > LOOSE_MAX_CHARS:
        return name
    return " ".join(unicodedata.normalize("NFC", name).casefold().split())


def short(name: str) -> str:
    """Return a name for a message: quoted, on one line, at most 40 characters."""
    text = repr(name)
    return text if len(text) <= 40 else f"{text[:36]}...{text[0]}"


def some(names: Iterable[str]) -> str:
    """Return names for a message: the first few, at most 140 characters."""
    shown: list[str] = []
    for name in names:
        if sum(len(text) + 2 for text in shown) + len(short(name)) > 130:
            shown.append("...")
            break
        shown.append(short(name))
    return f"[{', '.join(shown)}]"
