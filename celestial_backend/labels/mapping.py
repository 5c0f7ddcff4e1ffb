"""
Label config ↔ model classes, both ways; and which controls the page shows when some choices are ticked.

`ChoiceMap.from_config` reads a label config once: which controls are on which Image, under which key a task keeps
that picture, when the page shows them, and which choice stands for which class. Then `prediction` turns
probabilities into regions; `choices_of` reads the regions of an annotation.

When a control is shown, the editor's own rules say (its ``VisibilityMixin`` and ``Result.canBeSubmitted``, seen on
1.23.2): ``visibleWhen`` with ``whenTagName`` and ``whenChoiceValue``, at a control and at every View around it. What
is ticked in a control that is hidden itself fulfils nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from graphlib import CycleError, TopologicalSorter
from textwrap import shorten
from types import MappingProxyType
from typing import Any, NamedTuple

from celestial_backend.errors import LabelConfigError, ModelError
from celestial_backend.labels.config import (
    CHOICE_SELECTED,
    CHOICE_UNSELECTED,
    CHOICES,
    REGION_SELECTED,
    TAXONOMY,
    Condition,
    LabelConfig,
    Tag,
    key_of,
    loose,
    read,
    short,
    some,
)
from celestial_backend.labels.controls import KIND_OF, UNKNOWN, Columns, Control, match

Ticked = Mapping[str, Collection[str]]  # control -> choices
SMALL_CHARS = 100_000  # of a config of which many are remembered; of larger ones, two
CONTROLS_MAX, KEYS_MAX = 200, 16  # of a config that are served; each task has an answer of one, a picture of the other
MAX_WARNINGS = 20  # each becomes a line in the log, and a config may have thousands of controls
MAX_MESSAGE_CHARS = 400  # it may become the reason phrase of an HTTP status line
NOTHING_TO_SERVE = "The label config has no Choices on an Image that the model can serve."


@dataclass(frozen=True)
class Rule:
    """
    One condition, with the choices that fulfil it.

    Attributes:
        ticked: They must be ticked, or must not be.
        among: The controls that it looks at.
        wanted: Of these, control and choice that fulfil it; None for any choice.
        named: It names the one control that it looks at, and else looks at all Choices.
    """

    ticked: bool
    among: frozenset[str]
    wanted: frozenset[tuple[str, str]] | None
    named: bool

    def holds(self, said: Ticked) -> bool:
        """Whether the page shows what has this rule."""
        return self.ticked == any(
            self.wanted is None or any((name, choice) in self.wanted for choice in choices)
            for name, choices in said.items()
            if name in self.among and choices
        )


def rules_of(config: LabelConfig) -> tuple[dict[str, list[Rule]], dict[str, str]]:
    """
    When the page shows the controls of a config.

    Returns:
        The rules of each control that has some, and, for each whose prediction the page never shows, why.
    """
    conditions = _Conditions(config)
    rules: dict[str, list[Rule]] = {}
    never: dict[str, str] = {}
    for tag in conditions.tags.values():
        for condition in tag.conditions:
            rule = conditions.rule(condition)
            if isinstance(rule, str):
                never.setdefault(tag.name, rule)
            elif rule not in (mine := rules.setdefault(tag.name, [])):
                mine.append(rule)
    for name in rules.keys() - in_order(rules) - never.keys():
        never[name] = "whether the page shows it depends on itself (visibleWhen)"
    return {name: mine for name, mine in rules.items() if name not in never}, never


def in_order(rules: Mapping[str, Iterable[Rule]]) -> list[str]:
    """
    The controls that have rules, be it none, each after those that its rules name.

    Without those that depend on themselves, or on such a control.
    """
    sorter = TopologicalSorter(
        {name: [seen for rule in mine if rule.named for seen in rule.among if seen in rules]
         for name, mine in rules.items()}
    )  # fmt: skip
    with suppress(CycleError):  # what is in no circle can be had all the same
        sorter.prepare()
    order: list[str] = []
    while ready := sorter.get_ready():
        order += ready
        sorter.done(*ready)
    return order


class _Conditions:
    """The conditions of a config; each is judged once, however many controls lie in its View."""

    def __init__(self, config: LabelConfig) -> None:
        self.tags = {tag.name: tag for tag in reversed(config.tags)}
        self._judged: dict[int, Rule | str] = {}
        self._named: dict[str, dict[str, set[str]]] = {}

    def rule(self, condition: Condition) -> Rule | str:
        """What a condition asks for; a sentence where it can never be fulfilled by what is predicted."""
        found = self._judged.get(id(condition))
        if found is None:
            found = self._judged[id(condition)] = self._rule(*condition)
        return found

    def _rule(self, when: str, name: str, values: tuple[str, ...], own: bool) -> Rule | str:
        if when == REGION_SELECTED:
            return "the page shows it only while a region is selected (visibleWhen)"
        if not when:  # which the editor compares with what is kept, not with what is seen
            return Rule(True, self._all, frozenset(_found(self._kept, values)), False)
        if not name:
            if when == CHOICE_UNSELECTED:
                return "the page hides it as soon as anything is chosen (visibleWhen without whenTagName)"
            wanted = frozenset(_found(self._seen, values)) if own and values else None
            return Rule(True, self._all, wanted, False)
        if name in self.tags:
            if own and values and when == CHOICE_SELECTED and self.tags[name].kind == TAXONOMY:
                return (f"Label Studio does not keep what depends on a choice of a Taxonomy, {short(name)}; put"
                        " visibleWhen on a View around it")
            wanted = frozenset((name, label) for value in values for label in self._labels(name).get(value, ()))
            return Rule(when == CHOICE_SELECTED, frozenset({name}), wanted if values else None, True)
        if values or when == CHOICE_SELECTED:
            return f"it depends on {short(name)}, which is no control with choices (whenTagName)"
        return Rule(False, frozenset({name}), None, True)

    @cached_property
    def _all(self) -> frozenset[str]:
        return frozenset(name for name, tag in self.tags.items() if tag.kind == CHOICES)

    @cached_property
    def _kept(self) -> dict[str, list[tuple[str, str]]]:
        """By what Label Studio writes, control and choice, of all Choices."""
        labels = ((name, {choice.label for choice in self.tags[name].choices}) for name in self._all)
        return _listed((label, (name, label)) for name, mine in labels for label in mine)

    @cached_property
    def _seen(self) -> dict[str, list[tuple[str, str]]]:
        """By alias or value, control and choice, of all Choices."""
        named = ((name, value, labels) for name in self._all for value, labels in self._labels(name).items())
        return _listed((value, (name, label)) for name, value, labels in named for label in labels)

    def _labels(self, name: str) -> dict[str, set[str]]:
        if name not in self._named:
            self._named[name] = _named(self.tags[name])
        return self._named[name]


def _listed(pairs: Iterable[tuple[str, tuple[str, str]]]) -> dict[str, list[tuple[str, str]]]:
    listed: dict[str, list[tuple[str, str]]] = {}
    for value, pair in pairs:
        listed.setdefault(value, []).append(pair)
    return listed


def _found(listed: Mapping[str, Iterable[tuple[str, str]]], values: Iterable[str]) -> Iterable[tuple[str, str]]:
    return (pair for value in values for pair in listed.get(value, ()))


def _named(tag: Tag) -> dict[str, set[str]]:
    """The choices that an alias or a value stands for: the first one; of a Taxonomy, all that end in its name."""
    first: dict[str, str] = {}
    labels: dict[str, set[str]] = {}
    for choice in tag.choices:
        labels.setdefault(choice.name, set()).add(choice.label)
        first.setdefault(choice.name, choice.name)
        first.setdefault(choice.value, choice.name)
    return {value: labels[name] for value, name in first.items()}


class Vocabulary(NamedTuple):
    """What a model can say: the same classes for every control, or those of its heads, in the order of its row."""

    classes: tuple[str, ...] = ()
    own: tuple[Columns, ...] = ()

    def choices(self, label_config: str) -> ChoiceMap:
        """
        The map for a label config; as `ChoiceMap.from_config`.

        Raises:
            LabelConfigError: As there.
        """
        return ChoiceMap.from_config(label_config, self.classes, self.own)


@dataclass(frozen=True)
class ChoiceMap:
    """
    The choices of a label config, matched with the classes of a model.

    Never changes after it is made; any number of threads may share it.

    Attributes:
        classes: The model's classes, in the order of its probabilities; those of one head after those of another.
        controls: Those that the model serves, in the config's order; none while it knows no choice.
        warnings: Sentences about what the model will not predict, for the log.
        rules: Control -> what must hold for the page to show it; only of those that the page may hide.
        barred: Control -> choices that are not predicted, as if they were known to be wrong.
    """

    classes: tuple[str, ...]
    controls: tuple[Control, ...]
    warnings: tuple[str, ...]
    rules: Mapping[str, tuple[Rule, ...]] = field(default_factory=dict, hash=False)
    barred: Mapping[str, Collection[str]] = field(default_factory=dict, hash=False)

    @classmethod
    def from_config(cls, label_config: str, classes: Sequence[str], own: Sequence[Columns] = ()) -> ChoiceMap:
        """
        The map for a label config and what a model knows; the last few are remembered.

        Args:
            label_config: The project's; without a control, or blank, it gives a map without one.
            classes: Those of a model that answers all controls with the same row, or none.
            own: Those of a model with heads, in the order of its row. A head answers the control
                that it was learned for, or, if the config has that no more, one without a head
                that shares a choice with it.

        Raises:
            LabelConfigError: The config is not XML, or has controls and none of them can be served. One line,
                at most 400 characters.
        """
        if not isinstance(label_config, str):
            raise LabelConfigError(f"The label config must be XML text, got {type(label_config).__name__}.")
        known = _choice_map if len(label_config) <= SMALL_CHARS else _large_choice_map
        return known(label_config, tuple(classes), tuple(own))

    @classmethod
    def for_learning(cls, label_config: str) -> ChoiceMap:
        """
        The map that reads labels to learn from: the classes of every control are its own choices.

        Raises:
            LabelConfigError: The config is not XML, or has no control that can be served.
        """
        config = read(label_config)
        own: list[Columns] = []
        for tag in config.tags:
            if not _place(tag, config)[2]:
                start = sum(len(each.classes) for each in own)
                own.append(Columns(tag.name, start, _labels(tag)))
        found = _matched(config, (), tuple(own))
        if not found.controls:
            raise LabelConfigError(f"{NOTHING_TO_SERVE} It has no control at all.")
        return found

    @property
    def data_keys(self) -> tuple[str, ...]:
        """The keys under which a task keeps the pictures, each once, in the config's order; see `values`."""
        return tuple(dict.fromkeys(control.data_key for control in self.controls))

    def prediction(
        self,
        probabilities: Mapping[str, Sequence[float]],
        strangeness: Mapping[str, Sequence[float]] | None = None,
        *,
        by_lead: bool = False,
    ) -> tuple[list[dict[str, Any]], float]:
        """
        The regions of one task, and its score.

        Args:
            probabilities: Data key -> K probabilities in the order of `classes`; a control
                whose key is absent says nothing. What is not a number counts as 0.
            strangeness: Data key -> of each head, how unlike the picture is to what it learned; 0 where it is not told.
            by_lead: The task's score is the lowest `Control.lead`; that of a region stays what `Control.choose` trusts.

        Returns:
            One region per control that does not abstain and that the page will show, and the task's score, 0 to 1,
            which is the lowest of the shown controls' (see `Control.choose`), and 0 without any.

        Raises:
            ModelError: A row has not one probability per class.
        """
        said: dict[str, list[str]] = {}
        score_of: dict[str, float] = {}
        leads: list[float] = []
        for control in self._asked:
            row = probabilities.get(control.data_key)
            if row is None or not self._shows(control.from_name, said):
                continue
            if len(row) != len(self.classes):
                raise ModelError(f"The model gave {len(row)} probabilities for its {len(self.classes)} classes.")
            strange = float(strangeness[control.data_key][control.columns.head]) if strangeness else 0.0
            if control.from_name in self.barred:
                row = control.without(row, self.barred[control.from_name])
            said[control.from_name], score_of[control.from_name] = control.choose(row, strange)
            leads += [control.lead(row, strange)] if by_lead else []
        regions = [
            {"id": f"choice-{number}", **control.region(chosen), "score": score_of[control.from_name]}
            for number, control in enumerate(self.controls, 1)
            if (chosen := said.get(control.from_name))
        ]
        return regions, min(leads if by_lead else score_of.values(), default=0.0)

    def choices_of(self, result: object) -> dict[str, list[str]]:
        """
        The choices that the regions of an annotation name, by control (`from_name`), each once.

        Also those that are not on offer any more. Regions of other controls or objects, and
        those without a choice, are passed over.
        """
        found: dict[str, dict[str, None]] = {}
        for region in result if isinstance(result, list) else ():
            try:
                control = self._served[region["from_name"], region["to_name"]]
            except (KeyError, TypeError):  # another kind of region
                continue
            if names := control.choices_in(region):
                found.setdefault(control.from_name, {}).update(dict.fromkeys(names))
        return {from_name: list(names) for from_name, names in found.items()}

    def asked(self, said: Ticked) -> Collection[str]:
        """
        The controls that the page showed, by what somebody chose: see `choices_of`.

        Where one depends on a control that is not served, whose choices are not read, what was answered was asked.
        """
        if not self.rules:
            return self._names
        standing, found = dict(said), set()
        for control in self._asked:
            name, rules = control.from_name, self.rules.get(control.from_name, ())
            known = all(rule.named and rule.among <= self._names for rule in rules)
            if self._shows(name, standing) or (not known and name in said):
                found.add(name)
            else:
                standing.pop(name, None)  # left over from when it was shown
        return found

    def _shows(self, control: str, said: Ticked) -> bool:
        return all(rule.holds(said) for rule in self.rules.get(control, ()))

    @cached_property
    def _asked(self) -> tuple[Control, ...]:
        """The controls, each after those that its being shown depends on."""
        if not self.rules:
            return self.controls
        by_name = {control.from_name: control for control in self.controls}
        return tuple(by_name[name] for name in in_order({name: self.rules.get(name, ()) for name in by_name}))

    @cached_property
    def _served(self) -> dict[tuple[str, str], Control]:
        return {(control.from_name, control.to_name): control for control in self.controls}

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(control.from_name for control in self.controls)


def _read_choice_map(label_config: str, classes: tuple[str, ...], own: tuple[Columns, ...]) -> ChoiceMap:
    return _matched(read(label_config), classes, own)


_choice_map = lru_cache(maxsize=32)(_read_choice_map)
_large_choice_map = lru_cache(maxsize=2)(_read_choice_map)


def _matched(config: LabelConfig, classes: tuple[str, ...], own: tuple[Columns, ...]) -> ChoiceMap:
    controls: dict[str, Control] = {}
    keys: set[str] = set()
    warnings: list[str] = []
    offered: dict[str, None] = {}
    columns = _Assignment(config, classes, own)
    rules, never = rules_of(config)
    for tag in config.tags:
        to_name, data_key, reason = _place(tag, config)
        reason = reason or never.get(tag.name, "")
        if not reason and (len(controls) >= CONTROLS_MAX or (data_key not in keys and len(keys) >= KEYS_MAX)):
            reason = f"{CONTROLS_MAX} controls on {KEYS_MAX} images are served, and this is one too many"
        if reason or tag.name in controls:
            warnings.append(f"Control {short(tag.name)} is skipped: {reason or 'another control has its name'}.")
            continue
        offered |= dict.fromkeys(_labels(tag))
        control, remarks = _control(tag, to_name, data_key, columns.of(tag))
        warnings += [f"Control {short(tag.name)}: {remark}." for remark in remarks]
        if control.choice_of:
            controls[tag.name] = control
            keys.add(data_key)
    if not offered and config.controls:
        others = [element for element in config.controls.values() if element.lower() not in KIND_OF]
        told = [f"It has {some(dict.fromkeys(others))}, which offer no choices."] if others else []
        message = " ".join([NOTHING_TO_SERVE, *warnings, *told])
        raise LabelConfigError(shorten(message, MAX_MESSAGE_CHARS, placeholder=" ..."))
    row = classes or tuple(name for columns in own for name in columns.classes)
    served = {name for control in controls.values() for name in control.choice_of}
    lost = [name for name in dict.fromkeys(row) if name not in served]
    if offered and not controls:
        warnings.insert(0, f"None of the choices {some(offered)} is a class of the model {some(row)}. "
                           "Label pictures for it to learn, rename a choice, or add predicted_values.")
    elif lost and offered:
        warnings.append(f"No choice stands for the classes {some(lost)}, so they are never predicted.")
    warnings[MAX_WARNINGS:] = [f"{len(warnings) - MAX_WARNINGS} more such remarks."] * (len(warnings) > MAX_WARNINGS)
    kept = {name: tuple(found) for name, found in rules.items() if name in controls}
    return ChoiceMap(row, tuple(controls.values()), tuple(warnings), MappingProxyType(kept))


class _Assignment:
    """Which columns answer which control of a config; each head answers one."""

    def __init__(self, config: LabelConfig, classes: tuple[str, ...], own: tuple[Columns, ...]) -> None:
        self._any = Columns("", 0, classes, learned=bool(own))
        names = {tag.name for tag in config.tags}
        self._own = {columns.control: columns for columns in reversed(own)}
        self._free = [columns for columns in own if columns.control not in names]

    def of(self, tag: Tag) -> Columns:
        """Return the columns of a control; those of another one that the config has no more, if they share a choice."""
        if columns := self._own.pop(tag.name, None):
            return columns
        choices = set(map(loose, _labels(tag)))
        shared = [len(choices.intersection(map(loose, columns.classes))) for columns in self._free]
        if not any(shared):
            return self._any
        return self._free.pop(shared.index(max(shared)))


def _place(tag: Tag, config: LabelConfig) -> tuple[str, str, str]:
    """Return the name and data key of a control's Image, and the reason to skip the control, or ""."""
    if reason := KIND_OF[tag.kind].unfit(tag):
        return "", "", reason
    to_names = tag.attributes["toname"].split(",")
    found = [name for name in to_names if name in config.images]
    if not found:
        return "", "", f"no Image is among its toName {some(to_names)}"
    if len(found) > 1:
        return "", "", f"it is about several images at once (toName {some(found)})"
    data_key = key_of(config.images[found[0]])
    if not data_key:
        return "", "", f"the Image {short(found[0])} shows a list (valueList) or has no value of the form $key"
    return found[0], data_key, ""


def _labels(tag: Tag) -> tuple[str, ...]:
    return tuple(dict.fromkeys(choice.label for choice in KIND_OF[tag.kind].offered(tag)))


def _control(tag: Tag, to_name: str, data_key: str, columns: Columns) -> tuple[Control, list[str]]:
    """Return a control, matched with its classes, and what is worth a warning."""
    kind = KIND_OF[tag.kind]
    offered = kind.offered(tag)
    choices = _labels(tag)
    known = set(choices)
    itself = known.intersection(columns.classes) if columns.learned else set()
    others, remarks = match(offered, [name for name in columns.classes if name not in itself])
    choice_of = {
        name: name if name in itself else others[name] for name in columns.classes if name in itself or name in others
    }
    said = set(choice_of.values())
    unknown = next((choice.label for choice in offered if UNKNOWN in choice.predicted), None)
    unused = [choice for choice in choices if choice not in said and choice != unknown]
    if unused:
        remarks.append(f"the choices {some(unused)} are not learned yet" if columns.learned
                       else f"the model never predicts the choices {some(unused)}")
    remarks += [f"the choices {some(dict.fromkeys(labels))} {reason}" for reason, labels in kind.left_out(tag).items()]
    threshold: float | None = None
    text = tag.get("model_score_threshold")
    try:
        threshold = float(text) if text else None
    except ValueError:
        threshold = -1.0
    if threshold is not None and not 0 <= threshold <= 1:
        remarks.append(f"model_score_threshold must be a number from 0 to 1, got {short(text)}; it is ignored")
        threshold = None
    most = kind.at_most(tag)
    return kind(
        tag.name, to_name, data_key, most != 1, most, threshold, choices,
        MappingProxyType({choice.label: kind.written_for(choice) for choice in reversed(offered)}),
        MappingProxyType(choice_of), columns, unknown,
    ), remarks  # fmt: skip
