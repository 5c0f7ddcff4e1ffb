"""
The controls that are served, one class each, and how classes find their choices.

A *choice* is Label Studio's word, spelled as the config spells it (its alias, or else its value; of a Taxonomy the
whole path); a *class* is the model's, and of a head that has learned one control the classes are that control's own
choices.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

from celestial_backend.labels.config import CHOICES, TAXONOMY, Choice, Tag, label_of, loose, short, some

DEFAULT_THRESHOLD = 0.5
UNKNOWN = "__unknown__"  # in predicted_values: the choice for pictures unlike all that was learned
UNKNOWN_SCORE = 0.01  # of such a picture, at most; below what any choice gets
NUMBER_MAX_CHARS, ANY_NUMBER = 100, 1e6  # more may be chosen than anybody offers
UNSURE = (
    'may have another name on the page, or none: from the task, a text inside the tag, alias="" or a condition; write '
    '<Choice value="…"/>'
)
_EXACT, _LOOSE = (0, 2, 3), (1, 4, 5)  # ranks of predicted_values, name and value; the lowest wins a class


class Columns(NamedTuple):
    """
    Where the probabilities that answer one control stand in a model's row.

    Attributes:
        control: The control that they were learned for; "" for those that answer any.
        start: The first of as many columns as there are classes.
        learned: The classes are the control's own choices, and no names of a model's maker.
        multiple: Each class has a probability by itself; else all together have 1.
        at_least_one: The best class is said where none of several reaches a half.
        head: Which of the model's heads gives them.
    """

    control: str
    start: int
    classes: tuple[str, ...]
    learned: bool = True
    multiple: bool = False
    at_least_one: bool = False
    head: int = 0


@dataclass(frozen=True)
class Control:
    """
    One control of a label config that the model serves.

    Attributes:
        data_key: Where a task keeps the picture: see `values`.
        multiple: Several choices may be made.
        most: How many at most, None for any number.
        threshold: The least probability to be predicted, or None if the config gives none.
        choices: All choices on offer, in the config's order and spelling.
        written: Choice -> what stands for it in a region.
        choice_of: Class -> choice, at least one, in the model's order.
        columns: Its classes, and where a row has their probabilities.
        unknown: The choice for pictures unlike all that was learned (``predicted_values="__unknown__"``), or None.
    """

    from_name: str
    to_name: str
    data_key: str
    multiple: bool
    most: int | None
    threshold: float | None
    choices: tuple[str, ...]
    written: Mapping[str, Any] = field(hash=False)
    choice_of: Mapping[str, str] = field(hash=False)
    columns: Columns
    unknown: str | None = None

    type: ClassVar[str]  # of its regions, in them the key of its value, and, in lower case, the name of its element

    @classmethod
    def unfit(cls, tag: Tag) -> str:
        """Why a control of this kind is not served, "" if it is."""
        for key, reason in (
            ("model_skip", "the config says so"),
            ("perRegion", "it belongs to regions"),
            ("perItem", "it belongs to the items of a list"),
        ):
            if tag.says(key):
                return f"{reason} ({key})"
        if tag.repeated:
            return "it is repeated (Repeater), so its name depends on the task"
        if tag.get("value").startswith("$") or tag.get("apiUrl"):
            return "its choices come from the task (dynamic)"
        if cls.offered(tag):
            return ""
        left_out = cls.left_out(tag)
        return f"its choices {next(iter(left_out))}" if left_out else "it offers no choice"

    @classmethod
    def offered(cls, tag: Tag) -> list[Choice]:
        """The choices that the editor lets people tick, and that mean the same in every task."""
        raise NotImplementedError

    @classmethod
    def left_out(cls, tag: Tag) -> dict[str, list[str]]:
        """The other choices, by the reason why nobody can tick them, or not always under this name."""
        left: dict[str, list[str]] = {}
        known = {choice.label for choice in cls.offered(tag)}
        for choice in tag.choices:
            if choice.label not in known and (reason := cls.why_not(choice)):
                left.setdefault(reason, []).append(choice.label)
        return left

    @classmethod
    def why_not(cls, choice: Choice) -> str:
        """Why a choice is not offered; "" where that is as it should be."""
        return "" if choice.fixed else UNSURE

    @classmethod
    def at_most(cls, tag: Tag) -> int | None:
        """How many of them may be ticked, None for any number."""
        raise NotImplementedError

    @classmethod
    def written_for(cls, choice: Choice) -> Any:
        """What stands for a choice in a region."""
        raise NotImplementedError

    @classmethod
    def choice_in(cls, written: object) -> str | None:
        """The choice that something in a region stands for, None where it is none."""
        raise NotImplementedError

    def name(self, choice: str) -> str:
        """What Label Studio writes for a choice alone, without what it lies in."""
        written = self.written[choice]
        return str(written if isinstance(written, str) else written[-1])

    def region(self, choices: Sequence[str]) -> dict[str, Any]:
        """A region with these choices, as Label Studio keeps it."""
        written = [self.written.get(choice, choice) for choice in choices]
        value = {self.type: [list(each) if isinstance(each, tuple) else each for each in written]}
        return {"from_name": self.from_name, "to_name": self.to_name, "type": self.type, "value": value}

    def choices_in(self, region: Mapping[str, Any]) -> list[str]:
        """The choices that a region of this control names, also those that are not on offer any more."""
        value = region.get("value")
        given = value.get(self.type) if isinstance(value, Mapping) else None
        found = map(self.choice_in, given if isinstance(given, list) else ())
        return [choice for choice in found if choice]

    def choose(self, row: Sequence[object], strangeness: float = 0.0) -> tuple[list[str], float]:
        """
        Return the choices to predict, best first, none to abstain, and how far to trust them.

        The probabilities of the classes that one choice stands for add up. A class without a choice is no reason to
        tick another one: where those together are more likely than the best choice, there is none.

        The trust is the probability of the best choice; where each was learned by itself, the lowest probability
        with which one of them is rightly ticked or rightly not.

        Of a picture unlike all that was learned (a strangeness above 0, at most 1) nothing is predicted but the
        choice for such, and the trust is next to nothing: the stranger, the less.
        """
        if strangeness > 0:
            return [self.unknown] if self.unknown else [], UNKNOWN_SCORE * (1 - strangeness)
        probability_of, without = self._probabilities(row)
        ranked = sorted(probability_of, key=lambda choice: -probability_of[choice])
        least = DEFAULT_THRESHOLD if self.threshold is None else self.threshold
        said = [choice for choice in ranked if probability_of[choice] >= max(least, without)]
        if not said and self.threshold is None and (self.columns.at_least_one or not self.columns.multiple):
            said = [choice for choice in ranked[:1] if probability_of[choice] >= without]
        said = said[: self.most]
        if not (self.multiple and self.columns.multiple):
            return said, probability_of[ranked[0]]
        return said, min(share if choice in said else 1 - share for choice, share in probability_of.items())

    def without(self, row: Sequence[object], barred: Collection[str]) -> list[float]:
        """The row as if some choices were known to be wrong; the rest of its probabilities adds up to 1 again."""
        columns, left = self.columns, [_probability(share) for share in row]
        for column, name in enumerate(columns.classes, columns.start):
            if self.choice_of.get(name) in barred:
                left[column] = 0.0
        mine = slice(columns.start, columns.start + len(columns.classes))
        total = sum(left[mine])
        if total > 0 and not columns.multiple:
            left[mine] = [share / total for share in left[mine]]
        return left

    def lead(self, row: Sequence[object], strangeness: float = 0.0) -> float:
        """
        How far the best choice leads over what is next, from 0 for a tie to 1; arguments as of `choose`.

        Next is another choice, or all classes together that have none. Where each choice was learned by itself, it is
        the lead of ticked over not ticked of the least sure one. Of a picture unlike all that was learned it is what
        `choose` trusts.
        """
        if strangeness > 0:
            return UNKNOWN_SCORE * (1 - strangeness)
        probability_of, without = self._probabilities(row)
        if self.multiple and self.columns.multiple:
            return min(abs(2 * share - 1) for share in probability_of.values())
        first, *others = sorted([*probability_of.values(), without, 0.0], reverse=True)
        return first - others[0]

    def _probabilities(self, row: Sequence[object]) -> tuple[dict[str, float], float]:
        """Those of the choices, and of all classes together that have no choice."""
        columns, without = self.columns, 0.0
        probability_of: dict[str, float] = {}
        shares = map(_probability, row[columns.start : columns.start + len(columns.classes)])
        for name, share in zip(columns.classes, shares, strict=True):
            choice = self.choice_of.get(name)
            if columns.multiple:
                if choice:
                    probability_of[choice] = max(share, probability_of.get(choice, 0.0))
            elif choice:
                probability_of[choice] = min(1.0, share + probability_of.get(choice, 0.0))
            else:
                without += share
        return probability_of, without


class Choices(Control):
    """Choices: one, or any number where it says ``choice="multiple"``."""

    type = CHOICES

    @classmethod
    def unfit(cls, tag: Tag) -> str:
        """As for all; the editor writes nested ones as paths, which Label Studio then refuses to import."""
        return "its choices are paths (allowNested)" if tag.says("allowNested") else super().unfit(tag)

    @classmethod
    def offered(cls, tag: Tag) -> list[Choice]:
        """Not those inside another Choice, which the editor does not show."""
        found = [choice for choice in tag.choices if len(choice.path) == 1 and choice.fixed]
        if cls.at_most(tag) is None:
            return found
        times = Counter(choice.label for choice in found)  # the editor ticks all of one name, and then refuses that
        return [choice for choice in found if times[choice.label] == 1]

    @classmethod
    def why_not(cls, choice: Choice) -> str:
        """As for all; and the rest lies inside another one, or has a namesake."""
        if len(choice.path) > 1:
            return "lie inside another Choice, which the editor does not show; take a Taxonomy for that"
        return super().why_not(choice) or "are there twice, and Submit then refuses both; give each another name"

    @classmethod
    def at_most(cls, tag: Tag) -> int | None:
        """One, unless it says otherwise."""
        return None if tag.get("choice") == "multiple" else 1

    @classmethod
    def written_for(cls, choice: Choice) -> str:
        """Its name."""
        return choice.name

    @classmethod
    def choice_in(cls, written: object) -> str | None:
        """A name that is not empty."""
        return written if isinstance(written, str) and written else None


class Taxonomy(Control):
    """A tree of choices, of which any number can be made, or as many as ``maxUsages`` says."""

    type = TAXONOMY

    @classmethod
    def unfit(cls, tag: Tag) -> str:
        """As for all."""
        if cls.at_most(tag) == 0:
            return f"nothing in it may be chosen (maxUsages {short(tag.get('maxUsages'))})"
        return "it labels parts of a text (labeling)" if tag.says("labeling") else super().unfit(tag)

    @classmethod
    def offered(cls, tag: Tag) -> list[Choice]:
        """All of the tree, or its leaves alone (``leafsOnly``)."""
        found: dict[str, Choice] = {}
        for choice in tag.choices:
            if choice.fixed:
                found.setdefault(choice.label, choice)
        if not tag.says("leafsOnly"):
            return list(found.values())
        parents = {choice.path[:-1] for choice in tag.choices}
        return [choice for choice in found.values() if choice.path not in parents]

    @classmethod
    def at_most(cls, tag: Tag) -> int | None:
        """What ``maxUsages`` says, which the editor reads as JavaScript reads numbers."""
        text = tag.get("maxUsages")[:NUMBER_MAX_CHARS].lower()
        try:
            number = float(int(text, 16)) if text.startswith("0x") else float(text.replace("_", "?"))
        except ValueError:
            return None
        return max(0, int(number)) if number < ANY_NUMBER else None

    @classmethod
    def written_for(cls, choice: Choice) -> tuple[str, ...]:
        """Its path, the outermost first."""
        return choice.path

    @classmethod
    def choice_in(cls, written: object) -> str | None:
        """A path of names."""
        is_path = isinstance(written, list) and written and all(isinstance(name, str) and name for name in written)
        return label_of(written) if is_path else None  # type: ignore[arg-type]


KINDS: tuple[type[Control], ...] = (Choices, Taxonomy)
KIND_OF = {kind.type: kind for kind in KINDS}


def match(choices: Sequence[Choice], classes: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """
    Return class -> choice, and a remark on every class that several choices claim.

    A class looks for its choice by `predicted_values`, exactly and then without regard to case and blanks; by name
    exactly; by the value behind an alias exactly; by name and then by value without regard to case and blanks. The
    first choice found has it.
    """
    claims: dict[tuple[int, str], dict[str, None]] = {}
    place, namesakes = _index(tuple(classes))
    named: set[str] = set()
    for choice in choices:
        for rank, names in enumerate((choice.predicted, (choice.name,), (choice.value,))):
            for name in filter(str.strip, names):
                key = loose(name)
                if key in namesakes:
                    claims.setdefault((_EXACT[rank], name), {})[choice.label] = None
                    claims.setdefault((_LOOSE[rank], key), {})[choice.label] = None
                    named.add(key)
    rivals: dict[str, list[dict[str, None]]] = {}
    for name in sorted((name for key in named for name in namesakes[key]), key=place.__getitem__):
        found = [claims.get((rank, name if rank in _EXACT else loose(name)), {}) for rank in range(6)]
        if any(found):
            rivals[name] = [labels for labels in found if labels]
    choice_of = {name: next(iter(found[0])) for name, found in rivals.items()}
    return choice_of, list(_remarks(rivals, choice_of))


def _remarks(rivals: Mapping[str, list[dict[str, None]]], choice_of: Mapping[str, str]) -> Iterator[str]:
    taken = set(choice_of.values())
    for name, (best, *others) in rivals.items():
        losers = [*list(best)[1:], *(label for labels in others for label in labels if label not in taken)]
        if losers:
            yield (f"several choices claim the class {short(name)}; {short(choice_of[name])} has it, "
                   f"not {some(dict.fromkeys(losers))}")


@lru_cache(maxsize=8)
def _index(classes: tuple[str, ...]) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Return the place of each class, and the classes by their loose name; a config may have thousands of controls."""
    place = {name: number for number, name in enumerate(classes)}
    namesakes: dict[str, list[str]] = {}
    for name in place:
        namesakes.setdefault(loose(name), []).append(name)
    return place, namesakes


def _probability(value: object) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return 0.0 if math.isnan(number) else min(max(number, 0.0), 1.0)
