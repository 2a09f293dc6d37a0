"""The bounded matcher speaks Python's language of patterns."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiliad.adapters.patterns import first_matches, fullmatches
from chiliad.errors import InvalidAdapter
from chiliad.testing import SMOLLM2, base_info

NAMES = tuple(site.name for site in base_info(SMOLLM2).sites)

_ATOMS = ["a", "b", "ab", ".", r"\.", r"\d", r"\w", r"\W", r"\S", "[ab]", "[^a.]", "[a-c1-3]", r"[\d.]",
          "^", "$", r"\b", r"\B", r"\A", r"\Z", "()"]  # fmt: skip
_QUANTIFIERS = ["*", "+", "?", "*?", "+?", "??", "{2}", "{1,3}", "{2,}", "{0,2}?"]
patterns = st.recursive(
    st.sampled_from(_ATOMS),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(_QUANTIFIERS)).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
        inner.map(lambda p: f"(?={p})"),
        inner.map(lambda p: f"(?!{p})"),
    ),
    max_leaves=6,
)


@given(patterns, st.lists(st.text("ab1.-\n", min_size=1, max_size=7), min_size=1, max_size=4))
@settings(max_examples=500, deadline=None)
def test_agrees_with_re(pattern: str, texts: list[str]) -> None:
    names = tuple(texts)
    assert fullmatches(pattern, names) == {n for n in names if re.fullmatch(pattern, n)}
    ends = {n for n in names if re.match(rf"(.*\.)?({pattern})$", n)}
    assert first_matches((pattern,), names) == dict.fromkeys(ends, pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q|v)_proj",
        r"model\.layers\.([0-9]|1\d)\..*(gate|up)_proj$",
        r"^(?!.*mlp).*",
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:k_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\."
        r"(?:self_attn|mlp)\.(?:(?:k_proj|up_proj)))",
        r"model.layers.\d+.self_attn.[qkv]_proj",
    ],
)
def test_patterns_as_people_write_them(pattern: str) -> None:
    found = fullmatches(pattern, NAMES)
    assert found == {name for name in NAMES if re.fullmatch(pattern, name)}
    assert found


@pytest.mark.parametrize(
    "pattern", [r"((([\w.]*)*)*)*!", r"(\w+.?)+$x", "(.*)(.*)(.*)(.*)(.*)(.*)(.*)=", "(a|a|aa)*" * 50]
)
def test_catastrophic_patterns_are_cheap(pattern: str) -> None:
    assert fullmatches(pattern, NAMES) == frozenset()


@given(st.lists(patterns, max_size=3, unique=True), st.lists(st.text("ab1.-", min_size=1, max_size=7)))
@settings(max_examples=200, deadline=None)
def test_the_first_key_counts(keys: list[str], names: list[str]) -> None:
    expected: dict[str, str] = {}
    for key in keys:
        for name in names:
            if re.match(rf"(.*\.)?({key})$", name):
                expected.setdefault(name, key)
    assert first_matches(tuple(keys), tuple(names)) == expected


def test_many_patterns_share_one_budget() -> None:
    with pytest.raises(InvalidAdapter, match="takes too long"):
        first_matches(tuple(f"(((.*)*)*)*x{i}" for i in range(4000)), NAMES)
    with pytest.raises(InvalidAdapter, match="4096"):
        first_matches(tuple(f"k{i}" for i in range(100_000)), NAMES)
    each = tuple(name.replace(".", r"\.") for name in NAMES)  # as converters write them
    assert first_matches(each, NAMES) == dict(zip(NAMES, each, strict=True))


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("(", "not a regular expression"),
        ("[z-a]", "not a regular expression"),
        (r"(?i)Q_PROJ", "flags"),
        (r"(?i:Q)_proj", "flags"),
        (r"(a)\1", "back-references"),
        (r"(?<=x)a", "look-behind"),
        (r"(a)?(?(1)b|c)", "not supported"),
        (r"(?>a+)b", "not supported"),
        ("a" * 5000, "limit"),
        ("(" * 2000 + ")" * 2000, "not a regular expression"),
        (r"(.?.?.?.?){50}" * 200, "takes too long"),
    ],
)
def test_refused(pattern: str, why: str) -> None:
    with pytest.raises(InvalidAdapter, match=why):
        fullmatches(pattern, NAMES)
