"""Exact match, its interval, and the evaluation loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmllm.errors import DataError
from mmllm.evaluation import evaluate, exact_match, normalise, wilson
from mmllm.processing.messages import Sample, parse_messages


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        ("Yes.", "yes", True),
        ("  dog  bark ", "Dog bark!", True),
        ("seven", "eleven", False),
        ("'3'", "3", True),
        ("", "no", False),
        ("“Zwölf”!", "zwölf", True),
        ("三。", "三", True),
        ("", "...", False),
        ("...", "", False),
        ("", "", True),
    ],
)
def test_exact_match_ignores_case_and_surrounding_punctuation(answer: str, reference: str, equal: bool) -> None:
    assert exact_match(answer, reference) == float(equal)


def test_punctuation_inside_counts() -> None:
    assert normalise("a-b") == "a-b"
    assert exact_match("a-b", "ab") == 0.0


def test_wilson_interval_of_eight_in_ten() -> None:
    # Worked from the formula by hand: centre 0.7168, half width 0.2267.
    low, high = wilson(0.8, 10)
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)
    assert wilson(0.0, 0) == (0.0, 1.0)
    assert wilson(1.0, 50)[1] == pytest.approx(1.0)


class Echo:
    """Answers with the last word of the question."""

    def generate(self, conversations: Any, *, root: Path | None, ids: list[str], max_new_tokens: int) -> list[str]:
        assert len(ids) == len(conversations)
        return [messages[-1].text.split()[-1] for messages in conversations]


def sample(id: str, question: str, answer: str, **tags: str) -> Sample:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Sample(id, parse_messages(turns), None, tags)


def test_evaluate_asks_the_last_user_turn_and_groups_by_field() -> None:
    earlier = parse_messages([{"role": "user", "content": "first"}, {"role": "assistant", "content": "wrong"}])
    two_turns = Sample("m", earlier + sample("x", "say two", "Two.").messages, None, {"type": "b"})
    samples = [sample("1", "say yes", "yes", type="a"), sample("2", "say no", "yes", type="a"), two_turns]
    report = evaluate(Echo(), samples, batch_size=2, group_by="type")  # type: ignore[arg-type]
    assert (report["n"], report["exact_match"]) == (3, pytest.approx(2 / 3))
    assert report["groups"]["a"]["exact_match"] == 0.5
    assert report["groups"]["b"]["exact_match"] == 1.0


def test_a_field_that_no_sample_has_is_an_error() -> None:
    with pytest.raises(DataError, match="no sample has a field 'typ' to group by; the fields are type; did you mean"):
        evaluate(Echo(), [sample("1", "say yes", "yes", type="a")], group_by="typ")  # type: ignore[arg-type]


def test_nothing_to_evaluate_is_an_error() -> None:
    with pytest.raises(DataError, match="no sample"):
        evaluate(Echo(), [])  # type: ignore[arg-type]
