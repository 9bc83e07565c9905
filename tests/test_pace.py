"""What is said of the time that is left, and when."""

import pytest

from anchors import pace
from anchors.pace import Interrupted, Pace


def said(monkeypatch, seconds: float, every: float = 30.0) -> list[str]:
    """Of ten units that take so long each."""
    now = iter(seconds * n for n in range(11))
    monkeypatch.setattr(pace.time, "monotonic", lambda: next(now))
    own = Pace("prompts", every)
    return [own.heard(done, 10) for done in range(11)]


@pytest.mark.parametrize(
    ("seconds", "lines"),
    [
        (0.1, []),
        (5, []),  # under a minute, and no half minute between lines before the last
        (
            20,
            [
                (1, "prompts: about 0:03:00 left at the pace so far"),
                (3, "prompts: 3 of 10, about 0:02:20 left"),
            ],
        ),
    ],
)
def test_a_minute_or_more_is_said_once_it_can_be_judged(monkeypatch, seconds, lines) -> None:
    found = said(monkeypatch, seconds)
    spoken = [(done, line) for done, line in enumerate(found) if line]
    assert spoken[: len(lines)] == lines
    if seconds == 0.1:
        assert spoken == []


def test_beside_a_bar_only_the_first_sentence_is_said(monkeypatch) -> None:
    assert [line for line in said(monkeypatch, 20, float("inf")) if line] == [
        "prompts: about 0:03:00 left at the pace so far"
    ]


def test_who_knows_what_is_kept_is_believed() -> None:
    assert Interrupted.of(KeyboardInterrupt(), "a").kept == "a"
    assert Interrupted.of(Interrupted(15, "b"), "a").kept == "b"
    assert Interrupted.of(Interrupted(15), "a").number == 15
