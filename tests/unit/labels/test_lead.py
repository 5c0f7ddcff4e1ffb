"""The lead of one choice over the next, which tasks may be sorted by."""

from __future__ import annotations

import pytest

from celestial_backend.labels import UNKNOWN_SCORE, ChoiceMap, Columns
from tests.unit.labels.test_mapping import CLASSES, IMAGE, values

TWO = (
    f'<View>{IMAGE}<Choices name="body" toName="image"><Choice value="Mars"/><Choice value="Moon"/></Choices>'
    '<Choices name="flaws" toName="image" choice="multiple"><Choice value="dark"/><Choice value="blur"/></Choices>'
    "</View>"
)
OWN = (Columns("body", 0, ("Mars", "Moon")), Columns("flaws", 2, ("dark", "blur"), multiple=True, head=1))


def said(config: str, *row: float, own: tuple[Columns, ...] = (), strange: float = 0.0) -> tuple[list[float], float]:
    """The scores of the regions, and that of the task."""
    choices = ChoiceMap.from_config(config, () if own else CLASSES, own)
    found, score = choices.prediction({"image": row}, {"image": [strange] * 2}, by_lead=True)
    return [region["score"] for region in found], score


@pytest.mark.parametrize(
    ("config", "row", "lead"),
    [
        pytest.param(values(*CLASSES), (0.7, 0.2, 0.1), 0.5, id="over the next choice"),
        pytest.param(values(*CLASSES), (0.4, 0.4, 0.2), 0.0, id="a tie"),
        pytest.param(values("Earth", "Mars"), (0.5, 0.1, 0.4), 0.1, id="over classes without a choice"),
        pytest.param(values("Earth"), (1.0, 0.0, 0.0), 1.0, id="one choice"),
    ],
)
def test_the_score_is_the_lead_and_that_of_the_region_the_probability(
    config: str, row: tuple[float, ...], lead: float
) -> None:
    assert said(config, *row) == ([max(row)], pytest.approx(lead))


def test_of_several_controls_the_lowest_lead_counts() -> None:
    """Where each choice was learned by itself, that of the one nearest to even."""
    assert said(TWO, 0.9, 0.1, 0.95, 0.4, own=OWN)[1] == pytest.approx(0.2)
    assert said(TWO, 0.55, 0.45, 0.95, 0.02, own=OWN)[1] == pytest.approx(0.1)


def test_a_picture_unlike_all_comes_before_every_tie() -> None:
    assert said(values(*CLASSES), 0.4, 0.4, 0.2, strange=0.5) == ([], UNKNOWN_SCORE / 2)
