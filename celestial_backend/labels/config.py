"""
What a label config says: its Choices and Taxonomies, the Images they are about, and when the page shows them.

Names, choices and aliases are read as Label Studio's own LabelInterface reads them, without its second of import
time; what is shown, and which of it can be ticked, as its editor decides it (seen on 1.23.2). `key_of` reads an
Image's ``value``; `value_of` finds what it means in a task. A *data key* is what stands after the ``$``: a key, a
path such as ``data.images[0].url``, or, after a "=", a text with such in it, ``=https://host/$name``.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from xml.parsers import expat

from celestial_backend.errors import FetchError, LabelConfigError

MAX_CHARS = 2_000_000  # of a label config; ten thousand choices have half of it
CONDITIONS_MAX = DEPTH_MAX = 20  # around one control, and of Choices in each other
PATH_MAX_CHARS = 500  # of a Taxonomy; what is longer is no choice
LOOSE_MAX_CHARS = 100  # putting n accents in order takes n * n steps
PATH = " / "  # between the parts of a Taxonomy's path, where Label Studio writes one as text
VARIABLE = re.compile(r"\$[\w\[\].{}]+", re.ASCII)  # what the editor puts values of the task in place of
_SLASHES = re.compile(r"(?:^|(?<= ))/+(?= |$)")
CHOICES, TAXONOMY = "choices", "taxonomy"
CHOICE_SELECTED, CHOICE_UNSELECTED = "choice-selected", "choice-unselected"
REGION_SELECTED = "region-selected"
HIDING = (CHOICE_SELECTED, CHOICE_UNSELECTED, REGION_SELECTED)  # all that can hide a control when a task is opened
KEY_MAX_CHARS, PART_MAX_CHARS = 1000, 8000
_KEY = re.compile(r"\$[^, {}]+")  # the SDK's rule; braces are a Repeater's, and no task has such a key
_ADDRESS = re.compile(r"https?://.|/.|data:image/|(s3|gs|azure-blob)://.", re.IGNORECASE)
_TEXT = "="
_MISSING = object()


class Choice(NamedTuple):
    """
    One Choice.

    Attributes:
        path: What Label Studio writes for it and for the Choices around it, the outermost first: alias, or else value.
        value: What people see.
        label: The path as text, by which we tell it from the others of its control; see `label_of`.
        predicted: The names of `predicted_values`.
        aliased: It has an alias.
        fixed: It is there under this name whatever the task is, and whatever else is chosen.
    """

    path: tuple[str, ...]
    value: str
    label: str
    predicted: tuple[str, ...] = ()
    aliased: bool = False
    fixed: bool = True

    @property
    def name(self) -> str:
        """What Label Studio writes for it alone."""
        return self.path[-1]


class Condition(NamedTuple):
    """
    When the page shows something.

    Attributes:
        when: One of `HIDING`; "" where ``whenChoiceValue`` stands alone.
        tag: The control that it looks at; "" for any.
        values: The choices that it looks for; none for any.
        own: It stands at the control itself, and not at a View around it: Submit leaves out what does not fulfil it.
    """

    when: str
    tag: str
    values: tuple[str, ...]
    own: bool


class Tag(NamedTuple):
    """
    One control, the choices inside it in their order, and all that must hold for the page to show it.

    Attributes:
        kind: The name of its element in lower case, which is also the type of its regions.
        attributes: By their names in lower case, which the editor does not tell apart.
        repeated: It stands in a Repeater, which makes other names of its own.
    """

    kind: str
    attributes: Mapping[str, str]
    choices: list[Choice]
    conditions: tuple[Condition, ...]
    repeated: bool

    @property
    def name(self) -> str:
        """What predictions name it by."""
        return self.attributes["name"]

    def get(self, key: str) -> str:
        """An attribute without blanks around it; "" without it."""
        return self.attributes.get(key.lower(), "").strip()

    def says(self, key: str) -> bool:
        """Whether an attribute is true."""
        return self.get(key).lower() == "true"


class LabelConfig(NamedTuple):
    """The controls with choices, the Images by name, and all controls: name -> element."""

    tags: list[Tag]
    images: Mapping[str, Mapping[str, str]]
    controls: Mapping[str, str]


def read(label_config: str) -> LabelConfig:
    """
    Return what a label config says; a blank one says nothing.

    A control has a name and a toName, and a Choice belongs to the nearest control around it. As in the editor, upper
    and lower case are one in the names of tags.

    Raises:
        LabelConfigError: It is not XML, or too long, or declares entities.
    """
    if not isinstance(label_config, str):
        raise LabelConfigError(f"The label config must be XML text, got {type(label_config).__name__}.")
    if len(label_config) > MAX_CHARS:
        raise LabelConfigError(f"A label config may have {MAX_CHARS:,} letters, and this one has {len(label_config):,}."
                               " Offer fewer choices.")
    reader = _Reader()
    parser = expat.ParserCreate()  # fetches nothing, and no declaration gets past the DOCTYPE
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = parser.CommentHandler = reader.text
    parser.StartDoctypeDeclHandler = _check_doctype
    try:
        parser.Parse(label_config.strip("\ufeff \t\r\n") or "<View/>", True)
    except (expat.ExpatError, ValueError) as error:  # ValueError: a text that UTF-8 cannot hold
        raise LabelConfigError(f"The label config is not readable XML: {error}.") from error
    return LabelConfig(reader.tags, reader.images, reader.controls)


class _Around(NamedTuple):
    """What an element lies in."""

    tag: Tag | None = None  # the nearest control
    path: tuple[str, ...] | None = ()  # of the Choices around, inside that control; None inside one that is none
    values: set[str] | None = None  # of the Choices that lie in the same Choice, so far
    conditions: tuple[Condition, ...] = ()
    repeated: bool = False


class _Open:
    """An element that has not ended yet, with what its content may change."""

    def __init__(self, around: _Around) -> None:
        self.around = around
        self.choice = -1  # its place among those of the control
        self.image = ""
        self.has_elements = self.has_content = False


class _Reader:
    def __init__(self) -> None:
        self.tags: list[Tag] = []
        self.images: dict[str, Mapping[str, str]] = {}
        self.controls: dict[str, str] = {}
        self._open = [_Open(_Around())]

    def start(self, element: str, given: dict[str, str]) -> None:
        self._open[-1].has_elements = True
        around, spelled, element = self._open[-1].around, element, element.lower()
        opened = _Open(around)
        attributes = {name.lower(): value for name, value in given.items()}
        name = attributes.get("name")
        if name and attributes.get("toname"):
            self.controls[name] = spelled
            around = self._control(element, attributes, around)
        elif element == "image" and name:
            self.images[name] = attributes
            opened.image = name
        elif element == "choice":
            around = _choice(attributes, around)
            if around.tag is not None and around.path is not None:
                opened.choice = len(around.tag.choices) - 1
        elif element == "repeater":
            around = around._replace(repeated=True)
        elif element == "view" and (found := _condition(attributes, own=False)):
            around = around._replace(conditions=(*around.conditions, found))
        if len(around.conditions) > CONDITIONS_MAX:
            raise LabelConfigError(f"A label config may nest {CONDITIONS_MAX} conditions (visibleWhen), and this one"
                                   " has more in each other. Take some away.")
        opened.around = around
        self._open.append(opened)

    def end(self, _element: str) -> None:
        """Content that is no element stands for the value, to the editor, and Label Studio does not know that."""
        opened = self._open.pop()
        if opened.has_content and not opened.has_elements:
            tag = opened.around.tag
            if opened.image:
                self.images[opened.image] = {}
            elif tag is not None and opened.choice >= 0:
                found = tag.choices[opened.choice]
                tag.choices[opened.choice] = found._replace(fixed=found.fixed and found.aliased)

    def text(self, text: str) -> None:
        """What stands between tags, blanks aside; comments too."""
        if not self._open[-1].has_content and text.strip():
            self._open[-1].has_content = True

    def _control(self, element: str, attributes: dict[str, str], around: _Around) -> _Around:
        found = _condition(attributes, own=True)
        conditions = (*around.conditions, found) if found else around.conditions
        tag = Tag(element, attributes, [], conditions, around.repeated)
        if element in (CHOICES, TAXONOMY):
            self.tags.append(tag)
        return _Around(tag, (), set(), conditions, around.repeated)


def _choice(attributes: Mapping[str, str], around: _Around) -> _Around:
    """Note a Choice with its control, and return what lies in it."""
    alias, value = attributes.get("alias"), attributes.get("value") or ""
    if around.tag is None or around.path is None or around.values is None or not (alias or value):
        return around._replace(path=None)
    path, in_tree = (*around.path, alias or value), around.tag.kind == TAXONOMY
    if in_tree and value in around.values:  # of its children with one value the editor takes the first
        return around._replace(path=None)
    if len(path) > DEPTH_MAX or (around.path and sum(map(len, path)) > PATH_MAX_CHARS):
        return around._replace(path=None)
    around.values.add(value)
    predicted = tuple(part.strip() for part in attributes.get("predicted_values", "").split(","))
    named = alias != "" and (bool(alias) or in_tree or not VARIABLE.search(value))
    always = not around.repeated and around.conditions == around.tag.conditions
    label = label_of(path) if in_tree or around.path else path[0]
    around.tag.choices.append(Choice(path, value, label, predicted, bool(alias), named and always))
    return around._replace(path=path, values=set())


def _condition(attributes: Mapping[str, str], *, own: bool) -> Condition | None:
    """What hides an element, as the editor reads it: what it does not know hides nothing."""
    when, value = attributes.get("visiblewhen", ""), attributes.get("whenchoicevalue", "")
    if when in HIDING:
        return Condition(when, attributes.get("whentagname", ""), tuple(value.split(",")) if value else (), own)
    return Condition("", "", (value,), own) if value and not when else None


def _check_doctype(_name: str, _system: object, _public: object, declares: int) -> None:
    if declares:  # entities, and attributes that every element gets: each may grow without bound
        raise LabelConfigError("The label config declares an XML entity, attribute or element in its DOCTYPE, which"
                               " is refused. Write the text out, and take the DOCTYPE away.")


def label_of(path: Sequence[str]) -> str:
    """A path as text, another one for each path: a name that looks like several gets longer slashes."""
    return PATH.join(_SLASHES.sub(lambda found: f"{found[0]}/", name) for name in path)


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


def key_of(image: Mapping[str, str]) -> str:
    """The data key of an Image, by its attributes; "" where it shows a list, or nothing that can be found."""
    value = image.get("value", "").strip()
    if image.get("valuelist") or len(value) > KEY_MAX_CHARS or "{" in value or "}" in value:
        return ""
    variables = VARIABLE.findall(value)
    if _KEY.fullmatch(value) and len(variables) < 2:
        return value[1:]
    return f"{_TEXT}{value}" if variables or _ADDRESS.match(value) else ""


def value_of(task_data: object, data_key: str) -> object:
    """
    What a task holds under a data key; a literal key with dots goes before a path.

    That is the editor's own rule (its ``parseValue``, and ``get`` of Lodash).

    Raises:
        FetchError: The task has no such key.
    """
    known = task_data if isinstance(task_data, Mapping) else {}
    is_text = data_key.startswith(_TEXT)
    found = _MISSING if is_text else _get(known, data_key)
    if found is not _MISSING:
        return found[0] if isinstance(found, list) and len(found) == 1 else found
    text = data_key.removeprefix(_TEXT) if is_text else f"${data_key}"
    if not is_text and VARIABLE.match(text) and VARIABLE.fullmatch(text) is None:
        is_text = _get(known, VARIABLE.match(text)[0][1:]) is not _MISSING  # type: ignore[index]
    if not is_text:
        raise _no_key(known, data_key)
    return VARIABLE.sub(lambda variable: _written(known, variable[0][1:]), text)


def _get(data: Mapping[str, Any], path: str) -> Any:
    if path in data:
        return data[path]
    found: Any = data
    for part in re.findall(r"[^.\[\]]+", path):
        if isinstance(found, Mapping) and part in found:
            found = found[part]
        elif isinstance(found, list) and part.isascii() and part.isdecimal() and int(part) < len(found):
            found = found[int(part)]
        else:
            return _MISSING
    return _MISSING if found is data else found


def _written(data: Mapping[str, Any], key: str) -> str:
    """A value inside a text, as JavaScript writes it."""
    found = _get(data, key)
    if isinstance(found, list) and len(found) == 1:
        (found,) = found
    if isinstance(found, bool) or not isinstance(found, str | int | float):
        raise _no_key(data, key)
    text = f"{found:.0f}" if isinstance(found, float) and found.is_integer() else str(found)
    if len(text) > PART_MAX_CHARS:
        raise FetchError(
            f"A part of an address may have {PART_MAX_CHARS:,} letters, and {short(key)} of the task has {len(text):,}."
        )
    return text


def _no_key(data: Mapping[str, Any], key: str) -> FetchError:
    return FetchError(
        f"The task has no data key {short(key)} that the label config names; it has {some(map(str, data))}."
    )
