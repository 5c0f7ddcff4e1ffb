"""One control's head: whose labels it learns, what it keeps of the live model's, and which labels it doubts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import cleanlab.filter
import numpy as np
import pytest
from numpy.typing import NDArray

from celestial_backend.labels import ChoiceMap, Control
from celestial_backend.learning.control import Champion, Kept, Lesson, Vectors, teach
from celestial_backend.learning.dataset import Dataset, Example, Gallery
from celestial_backend.models.headed import GENERAL, OWN, unit
from celestial_backend.models.manifest import Counts
from tests.support.backend_server import label_config
from tests.unit.learning.test_heads import clouds

CHOICES = ("dress", "hat", "shoe", "shirt", "skirt")
WIDTH = 1280


def control(choices: Sequence[str] = CHOICES, *, multiple: bool = False) -> Control:
    config = label_config(choices)
    if multiple:
        config = config.replace("<Choices ", '<Choices choice="multiple" ')
    (found,) = ChoiceMap.for_learning(config).controls
    return found


def picture(kind: int, number: int) -> bytes:
    return f"{kind} {number}".encode()


class Shop:
    """Pictures of clothes as clouds, one for each choice; some are labelled."""

    def __init__(self, each: int = 40, apart: float = 0.5) -> None:
        vectors, right = clouds(len(CHOICES), each, apart=apart)
        self.each = each
        self.vectors = {picture(int(kind), row % each): vectors[row] for row, kind in enumerate(right)}
        self.gallery = Gallery({GENERAL: dict(self.vectors)}, {GENERAL: {}})

    def example(self, kind: int, number: int, *choices: str, weight: float = 1.0) -> Example:
        place = kind * self.each + number
        said = frozenset(choices or {CHOICES[kind]})
        return Example(picture(kind, number), said, weight, (place,), (1000 + place,), "unaided")

    def labelled(self, *counts: int) -> list[Example]:
        """The first pictures of each kind."""
        return [self.example(kind, number) for kind, count in enumerate(counts) for number in range(count)]

    def data(self, examples: Sequence[Example], pool: Sequence[bytes] = ()) -> Dataset:
        return Dataset({"choice": list(examples)}, self.gallery, {"image": sorted(pool)}, Counts(), None, "")

    def says(self, lesson: Lesson, kind: int, start: int = 30) -> list[str]:
        """What a head says of the last pictures of a kind."""
        rows = np.stack([self.vectors[picture(kind, number)] for number in range(start, self.each)])
        return [lesson.head.classes[int(place)] for place in lesson.head.probabilities(rows).argmax(axis=1)]


class Knows(Champion):
    """A live model that knows the pictures of some kinds, and how sure it is of them."""

    def __init__(self, shop: Shop, *choices: str, sure: float = 0.97, network: bool = True) -> None:
        self.choices, self.sure, self.network = choices, sure, network
        self.sample = Kept()
        self.middles = np.stack([
            np.mean([shop.vectors[picture(CHOICES.index(choice), number)] for number in range(shop.each)], axis=0)
            for choice in choices
        ])  # fmt: skip

    def known(self, control: str) -> tuple[str, ...]:
        assert control == "choice"
        return self.choices

    def says(self, control: str, vectors: Mapping[str, Vectors]) -> NDArray[np.float64]:
        assert control == "choice"
        near = vectors[GENERAL] @ unit(self.middles.astype(np.float32)).T
        found = np.full(near.shape, (1 - self.sure) / max(1, len(self.choices) - 1))
        found[np.arange(len(found)), near.argmax(axis=1)] = self.sure
        return found

    def kept(self, control: str) -> Kept:
        assert control == "choice"
        return self.sample

    def is_network(self, control: str) -> bool:
        assert control == "choice"
        return self.network


@pytest.fixture(scope="module")
def shop() -> Shop:
    return Shop()


def taught(
    shop: Shop, examples: Sequence[Example], champion: Champion | None = None, pool: Sequence[bytes] = ()
) -> Lesson:
    lesson = teach(control(), shop.data(examples, pool), champion or Champion())
    assert lesson is not None
    return lesson


def test_a_controls_own_choices_are_learned(shop: Shop) -> None:
    """In the order of the config, those with labels; the head says pictures right that it never saw."""
    lesson = taught(shop, shop.labelled(8, 0, 8, 8))
    assert lesson.head.control == "choice"
    assert lesson.head.classes == ("dress", "shoe", "shirt")
    assert (lesson.head.spaces, lesson.head.multiple) == ((GENERAL,), False)
    assert lesson.verdict.publish
    assert lesson.verdict.scores.labels == 24
    for kind in (0, 2, 3):
        assert shop.says(lesson, kind) == [CHOICES[kind]] * 10
    assert lesson.fit.kept == lesson.fit.too_few == {}


def test_a_kind_that_nobody_labelled_is_strange_to_the_head(shop: Shop) -> None:
    """And so is what was labelled as nothing of it, though the head learns that choice like the others."""
    lesson = taught(shop, shop.labelled(20, 20, 20, 20))
    strange = strangeness_of(shop, lesson)
    assert (strange[4] > 0).mean() > 0.9
    assert (np.concatenate(strange[:4]) > 0).mean() < 0.1
    other = label_config(CHOICES).replace('"skirt"', '"skirt" predicted_values="__unknown__"')
    (found,) = ChoiceMap.for_learning(other).controls
    lesson = teach(found, shop.data(shop.labelled(20, 20, 20, 20, 20)), Champion()) or lesson
    assert "skirt" in lesson.head.classes
    assert (strangeness_of(shop, lesson)[4] > 0).mean() > 0.9


def strangeness_of(shop: Shop, lesson: Lesson) -> list[NDArray[np.float64]]:
    """By kind, of the pictures that no label shows."""
    last = [np.stack([shop.vectors[picture(kind, number)] for number in range(20, shop.each)]) for kind in range(5)]
    return [lesson.head.strangeness(rows) for rows in last]


def test_a_choice_with_one_label_is_told(shop: Shop) -> None:
    """It is not learned, and its label does not count."""
    lesson = taught(shop, shop.labelled(8, 8, 1, 1))
    assert lesson.head.classes == ("dress", "hat")
    assert lesson.fit.too_few == {"shirt": 1, "shoe": 1}
    assert lesson.verdict.scores.labels == 16


@pytest.mark.parametrize(
    "counts",
    [pytest.param((), id="nothing"), pytest.param((9,), id="one choice"), pytest.param((9, 1), id="one label of two")],
)
def test_too_few_labels_teach_nothing(shop: Shop, counts: tuple[int, ...]) -> None:
    """The live model goes on to answer the control."""
    assert teach(control(), shop.data(shop.labelled(*counts)), Champion()) is None


def test_labels_weigh_what_they_weigh(shop: Shop) -> None:
    """Wrong labels of a hundredth of the weight are outvoted."""
    wrong = [shop.example(kind, number, CHOICES[1 - kind], weight=0.01) for kind in (0, 1) for number in range(8, 20)]
    lesson = taught(shop, [*shop.labelled(8, 8), *wrong])
    assert shop.says(lesson, 0) == ["dress"] * 10
    assert shop.says(lesson, 1) == ["hat"] * 10


def test_random_labels_are_not_published(shop: Shop) -> None:
    """Nor suspected: a head that knows nothing blames nobody."""
    rng = np.random.default_rng(1)
    for count in (4, 12):
        names = rng.permutation([CHOICES[kind] for kind in range(5) for _ in range(count)])
        examples = [
            shop.example(place // count, place % count, str(name)) for place, name in enumerate(names)
        ]  # fmt: skip
        lesson = taught(shop, examples)
        assert not lesson.verdict.publish, lesson.verdict
        assert lesson.suspects == ()


def test_a_few_wrong_labels_are_named(shop: Shop) -> None:
    """The likeliest first, by their tasks, and none of the right ones; the head is good for all that."""
    examples = shop.labelled(12, 12, 12)
    wrong = [3, 17, 30]
    for place in wrong:
        kind = CHOICES.index(*examples[place].choices)
        examples[place] = examples[place]._replace(choices=frozenset({CHOICES[(kind + 1) % 3]}))
    lesson = taught(shop, examples)
    assert lesson.verdict.publish
    assert set(lesson.suspects) == {examples[place].task_ids[0] for place in wrong}


def test_labels_that_cleanlab_cannot_judge_are_learned(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever it raises costs the list of doubtful labels, and not the training; the log says why."""

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("Values in pred_probs must be between 0 and 1.")

    monkeypatch.setattr(cleanlab.filter, "find_label_issues", refuse)
    lesson = taught(shop, shop.labelled(12, 12, 12))
    assert lesson.verdict.publish
    assert lesson.suspects == ()
    assert "cleanlab cannot look for wrong labels among 36 (ValueError: Values in pred_probs" in caplog.text


def test_labels_that_contradict_the_others_count_little(shop: Shop) -> None:
    """Where they are more than a few; what is told of the head is what it was before they counted little."""
    examples = shop.labelled(15, 15, 15)
    wrong = range(0, 45, 5)
    for place in wrong:
        kind = CHOICES.index(*examples[place].choices)
        examples[place] = examples[place]._replace(choices=frozenset({CHOICES[(kind + 1) % 3]}))
    lesson = taught(shop, examples)
    assert lesson.fit.doubted > 2
    assert lesson.verdict.scores.right <= 45 - len(wrong) + 1
    right = {number for each in examples for number in each.annotation_ids} - {
        number for place in wrong for number in examples[place].annotation_ids
    }
    assert set(lesson.right) <= right
    for kind in range(3):
        assert shop.says(lesson, kind) == [CHOICES[kind]] * 10


def test_at_most_ten_are_named(shop: Shop) -> None:
    """Of a fifth of all labels."""
    examples = shop.labelled(24, 24, 24)
    for place in range(0, 72, 5):
        kind = CHOICES.index(*examples[place].choices)
        examples[place] = examples[place]._replace(choices=frozenset({CHOICES[(kind + 1) % 3]}))
    lesson = taught(shop, examples)
    assert len(lesson.suspects) == 10
    wrong = {examples[place].task_ids[0] for place in range(0, 72, 5)}
    assert set(lesson.suspects) <= wrong


def test_few_labels_are_not_doubted(shop: Shop) -> None:
    """Of fewer than twenty nobody knows enough."""
    examples = shop.labelled(8, 8)
    examples[3] = examples[3]._replace(choices=frozenset({"hat"}))
    assert taught(shop, examples).suspects == ()


# What the live model knows


def test_what_nobody_labelled_is_kept_by_pictures_without_a_label(shop: Shop) -> None:
    """Where the live model is sure of some; they are judged beside the labels, and count for nothing there."""
    champion = Knows(shop, "dress", "hat", "shoe")
    pool = [picture(kind, number) for kind in range(3) for number in range(10, 30)]
    lesson = taught(shop, shop.labelled(8, 0, 0, 8), champion, pool=pool)
    assert lesson.head.classes == ("dress", "hat", "shoe", "shirt")
    assert lesson.fit.kept == {"hat": 20, "shoe": 20}
    assert lesson.verdict.publish, lesson.verdict
    assert lesson.verdict.scores.labels == 16
    assert lesson.verdict.scores.kept.pictures == 40
    for kind in range(4):
        assert shop.says(lesson, kind) == [CHOICES[kind]] * 10


def test_what_the_live_model_is_not_sure_of_is_not_kept(shop: Shop) -> None:
    """A guess would teach the head what it guesses."""
    champion = Knows(shop, "dress", "hat", "shoe", sure=0.8)
    lesson = taught(shop, shop.labelled(8, 0, 0, 8), champion, pool=[picture(1, number) for number in range(20)])
    assert lesson.head.classes == ("dress", "shirt")


def test_a_single_picture_keeps_nothing(shop: Shop) -> None:
    """It could not be judged; two can."""
    champion = Knows(shop, "dress", "hat", "shoe")
    pool = [picture(1, 20), picture(2, 20), picture(2, 21)]
    lesson = taught(shop, shop.labelled(8, 0, 0, 8), champion, pool=pool)
    assert lesson.fit.kept == {"shoe": 2}


def test_at_most_forty_pictures_of_a_choice_are_kept() -> None:
    """And together they count no more than twenty labels."""
    shop = Shop(each=90)
    champion = Knows(shop, "hat", "shoe")
    pool = [picture(kind, number) for kind in (1, 2) for number in range(80)]
    lesson = taught(shop, shop.labelled(8), champion, pool=pool)
    assert lesson.fit.kept == {"hat": 40, "shoe": 40}
    assert shop.says(lesson, 0, 80) == ["dress"] * 10


def sample(shop: Shop, *kinds: int, count: int = 15) -> Kept:
    vectors = np.stack([shop.vectors[picture(kind, number)] for kind in kinds for number in range(10, 10 + count)])
    names = tuple(CHOICES[kind] for kind in kinds for _ in range(count))
    rng = np.random.default_rng(2)
    copies = np.repeat(vectors, 2, axis=0) + rng.standard_normal((2 * len(vectors), WIDTH)) * 1e-3
    originals = np.repeat(np.arange(len(vectors)), 2)
    return Kept(names, {GENERAL: vectors}, {GENERAL: unit(copies.astype(np.float32))}, originals)


def test_what_travels_with_the_live_model_is_kept(shop: Shop) -> None:
    """Also of choices that are labelled, where the labels mean the same."""
    champion = Knows(shop, "dress", "hat", "shoe")
    champion.sample = sample(shop, 0, 1, 2)
    lesson = taught(shop, shop.labelled(4, 0, 0, 8), champion)
    assert lesson.head.classes == ("dress", "hat", "shoe", "shirt")
    assert lesson.fit.kept == {"dress": 15, "hat": 15, "shoe": 15}
    assert lesson.verdict.publish, lesson.verdict
    for kind in range(4):
        assert shop.says(lesson, kind) == [CHOICES[kind]] * 10


def test_a_word_that_means_something_else_here_is_not_kept(shop: Shop) -> None:
    """What the project calls a dress are pictures of skirts: its labels go before."""
    champion = Knows(shop, "dress", "hat", "shoe")
    champion.sample = sample(shop, 0, 1, 2)
    skirts = [shop.example(4, number, "dress") for number in range(10)]
    lesson = taught(shop, [*skirts, *shop.labelled(0, 0, 0, 10)], champion)
    assert lesson.fit.kept == {"hat": 15, "shoe": 15}
    assert shop.says(lesson, 4) == ["dress"] * 10
    assert shop.says(lesson, 1) == ["hat"] * 10


def test_one_new_choice_is_enough_beside_kept_ones(shop: Shop) -> None:
    """A few labels of it alone, and nothing that was known is lost."""
    champion = Knows(shop, "dress", "hat", "shoe")
    champion.sample = sample(shop, 0, 1, 2)
    lesson = taught(shop, shop.labelled(0, 0, 0, 5), champion)
    assert lesson.head.classes == ("dress", "hat", "shoe", "shirt")
    assert lesson.verdict.publish, lesson.verdict


def test_a_network_that_says_as_much_stays(shop: Shop) -> None:
    """A head of ours is replaced by one that is as good, and knows the newer labels."""
    labels = shop.labelled(8, 8, 8)
    for network in (True, False):
        champion = Knows(shop, "dress", "hat", "shoe", network=network)
        assert taught(shop, labels, champion).verdict.publish is not network


def test_several_choices_are_learned_each_by_itself(shop: Shop) -> None:
    """One alone is enough; a choice with one label is passed over, and the picture's others count."""
    both = [shop.example(0, number, "dress", "hat") for number in range(10)]
    none = [shop.example(2, number)._replace(choices=frozenset()) for number in range(10)]
    one = [shop.example(1, number, "hat") for number in range(10)]
    odd = [shop.example(1, 10, "hat", "skirt")]
    data = shop.data([*both, *none, *one, *odd])
    lesson = teach(control(multiple=True), data, Champion())
    assert lesson is not None
    assert lesson.head.multiple
    assert not lesson.head.at_least_one
    assert lesson.head.classes == ("dress", "hat")
    assert lesson.fit.too_few == {"skirt": 1}
    assert lesson.verdict.publish, lesson.verdict
    rows = np.stack([shop.vectors[picture(kind, number)] for kind in (0, 2, 1) for number in range(30, 40)])
    said = lesson.head.probabilities(rows) >= 0.5
    assert said[:10].mean(axis=0) == pytest.approx([1, 1], abs=0.15)
    assert said[10:20].mean(axis=0) == pytest.approx([0, 0], abs=0.15)
    assert said[20:].mean(axis=0) == pytest.approx([0, 1], abs=0.15)


def test_where_all_pictures_have_a_choice_one_is_always_said(shop: Shop) -> None:
    """People who always tick something want to see a tick."""
    lesson = teach(control(multiple=True), shop.data(shop.labelled(8, 8)), Champion())
    assert lesson is not None
    assert lesson.head.at_least_one


def test_the_networks_own_features_are_tried_where_it_answers(shop: Shop) -> None:
    """Here the general ones tell nothing, and the network's all."""
    examples = shop.labelled(8, 8, 8)
    rng = np.random.default_rng(3)
    noise = {name: rng.standard_normal(32).astype(np.float32) for name in shop.vectors}
    gallery = Gallery({GENERAL: noise, OWN: dict(shop.vectors)}, {GENERAL: {}, OWN: {}})
    data = Dataset({"choice": examples}, gallery, {"image": []}, {}, None, "")

    class Own(Knows):
        def says(self, control: str, vectors: Mapping[str, Vectors]) -> NDArray[np.float64]:
            return super().says(control, {GENERAL: vectors[OWN]})

    lesson = teach(control(), data, Own(shop, "dress", "hat"), (GENERAL, OWN))
    assert lesson is not None
    assert OWN in lesson.head.spaces
    assert lesson.verdict.scores.right >= 22
    without = teach(control(), data, Champion(), (GENERAL, OWN))
    assert without is not None
    assert without.head.spaces == (GENERAL,), "a network that knows nothing of the control has nothing to give"
