"""Choices: stops, hold-back, endings. Text comes from a plain table, so the truth is obvious."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiliad.core import Request, SamplingParams, TokenLogprob
from chiliad.engine.output import Choice, StopStrings


class Letters:
    """A text stream in which token i is the i-th piece."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces

    def step(self, token_id: int) -> str:
        return self.pieces[token_id]

    def flush(self) -> str:
        return ""


def run(pieces: list[str], eos: frozenset[int] = frozenset(), **params: object):  # type: ignore[no-untyped-def]
    """Feed every piece until the choice ends; returns (text, chunks)."""
    sampling = SamplingParams(**{"max_tokens": 1000, **params})  # type: ignore[arg-type]
    choice = Choice(Request("r", (1,), sampling), 0, Letters(pieces), eos, sampling.max_tokens)
    chunks = []
    for token in range(len(pieces)):
        chunk = choice.push(token, TokenLogprob(token, -1.0) if sampling.logprobs is not None else None)
        if chunk is not None:
            chunks.append(chunk)
        if choice.finish_reason:
            break
    return "".join(c.text for c in chunks), chunks


def test_length_ends_with_the_last_token() -> None:
    text, chunks = run(["a", "b", "c", "d"], max_tokens=3)
    assert text == "abc"
    assert chunks[-1].finish_reason == "length"
    assert [i for c in chunks for i in c.token_ids] == [0, 1, 2]


def test_eos_is_not_text_and_is_counted() -> None:
    text, chunks = run(["a", "<eos>", "b"], eos=frozenset({1}))
    assert (text, chunks[-1].finish_reason, chunks[-1].stop_reason) == ("a", "stop", None)
    assert chunks[-1].token_ids == (1,)


def test_ignore_eos_and_stop_ids() -> None:
    assert run(["a", "<eos>", "b"], eos=frozenset({1}), ignore_eos=True)[0] == "a<eos>b"
    text, chunks = run(["a", "b", "c"], stop_token_ids=(1,))
    assert (text, chunks[-1].stop_reason) == ("a", 1)


def test_stop_string_across_tokens_is_never_seen() -> None:
    text, chunks = run(["he", "llo E", "N", "D more"], stop=("END",))
    assert (text, chunks[-1].finish_reason, chunks[-1].stop_reason) == ("hello ", "stop", "END")
    text, _ = run(["he", "llo E", "N", "D more"], stop=("END",), include_stop_str_in_output=True)
    assert text == "hello END"


def test_held_back_text_is_delivered_at_the_end() -> None:
    assert run(["hello E", "N"], stop=("END",), max_tokens=2)[0] == "hello EN"


def test_min_tokens_lets_stops_pass() -> None:
    assert run(["END", "x", "END", "y"], stop=("END",), min_tokens=2)[0] == "ENDx"


def test_logprobs_come_with_every_token() -> None:
    _, chunks = run(["a", "", "c"], logprobs=0, max_tokens=3)
    assert [lp.token_id for c in chunks for lp in c.logprobs or ()] == [0, 1, 2]


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.text(alphabet="abc", max_size=4), max_size=12),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
)
def test_stop_strings_equal_a_search_of_the_whole(pieces: list[str], stops: list[str], include: bool) -> None:
    whole = "".join(pieces)
    scanner = StopStrings(stops, include)
    sent, met = "", None
    for piece in pieces:
        text, met = scanner.push(piece)
        sent += text
        if met:
            break
    else:
        sent += scanner.flush()
    # What streaming must find: the stop that is complete first; then the leftmost such.
    ends = [(whole.find(s) + len(s), whole.find(s), s) for s in stops if s in whole]
    if not ends:
        assert (sent, met) == (whole, None)
        return
    assert met in stops
    at = whole.find(met)
    assert sent == (whole[: at + len(met)] if include else whole[:at])
    assert not any(s in sent for s in stops) or include


@pytest.mark.parametrize("reason", ["abort"])
def test_abort_flushes(reason: str) -> None:
    choice = Choice(Request("r", (1,), SamplingParams(stop=("END",))), 0, Letters(["xE"]), frozenset(), 9)
    first = choice.push(0, None)
    last = choice.abort()
    assert first is not None
    assert first.text + last.text == "xE"
    assert last.finish_reason == reason
