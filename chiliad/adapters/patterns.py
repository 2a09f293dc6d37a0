"""Module patterns of PEFT configs, matched in bounded time.

`target_modules`, `exclude_modules`, `rank_pattern` and `alpha_pattern` are Python regular
expressions written by strangers, and a backtracking matcher takes exponential time on the wrong
one. Python's own parser reads the pattern here (so the language is exactly Python's), but a set
of positions, kept as the bits of an integer, walks it: no backtracking, and a budget of steps
bounds even the worst config. Look-behind, back-references and flags are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from chiliad.errors import InvalidAdapter

_parser: Any = re._parser  # type: ignore[attr-defined]  # Python's own, so that no syntax differs

_MAX_LENGTH = 4096  # characters; generated patterns that list every layer stay below
_MAX_KEYS = 4096  # of rank_pattern or alpha_pattern: more than models have modules
_MAX_STEPS = 400_000  # for all patterns of one field, over all names: about a second
_PLAIN = re.compile(r"\^?(?:[\w.]|\\\.)+\$?")  # one linear scan per name is safe

_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_NOT_DIGIT": lambda c: not c.isdecimal(),
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_NOT_SPACE": lambda c: not c.isspace(),
    "CATEGORY_WORD": lambda c: c.isalnum() or c == "_",
    "CATEGORY_NOT_WORD": lambda c: not (c.isalnum() or c == "_"),
}


@lru_cache(maxsize=1024)
def fullmatches(pattern: str, names: tuple[str, ...]) -> frozenset[str]:
    """The names for which `re.fullmatch(pattern, name)` holds. Raises InvalidAdapter."""
    walk = _Walk(pattern)
    return frozenset(name for name in names if walk.ends(name) >> len(name) & 1)


@lru_cache(maxsize=256)
def first_matches(keys: tuple[str, ...], names: tuple[str, ...]) -> Mapping[str, str]:
    """By name the first key for which PEFT's `re.match(rf"(.*\\.)?({key})$", name)` holds.

    Raises InvalidAdapter.
    """
    if len(keys) > _MAX_KEYS:
        raise InvalidAdapter(f"a map of module patterns has {len(keys)} keys; {_MAX_KEYS} is the limit")
    found: dict[str, str] = {}
    steps = 0
    for key in keys:
        pattern = rf"(.*\.)?({key})$"
        if _PLAIN.fullmatch(key):  # nearly always a module name
            matches = [name for name in names if re.match(pattern, name)]
        else:
            walk = _Walk(pattern, steps)
            matches = [name for name in names if walk.ends(name)]
            steps = walk.steps
        for name in matches:
            found.setdefault(name, key)
    return found


def listed(entries: Sequence[str], names: Sequence[str]) -> set[str]:
    """PEFT's rule for lists of modules: an entry is the whole name or a dotted end of it."""
    ends = tuple("." + entry for entry in entries)
    return {name for name in names if name.endswith(ends) or name in entries}


class _Walk:
    """A parsed pattern that maps sets of positions to sets of positions.

    steps: how much of the budget other patterns have used.
    """

    def __init__(self, pattern: str, steps: int = 0) -> None:
        self.pattern, self.steps = pattern, steps
        if len(pattern) > _MAX_LENGTH:
            raise InvalidAdapter(
                f"a module pattern has {len(pattern)} characters; {_MAX_LENGTH} is the limit"
            )
        try:
            self.tree = _parser.parse(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise self._refuse(f"is not a regular expression ({error})") from None
        if self.tree.state.flags != int(re.UNICODE):
            raise self._refuse("uses flags; write it without (?...) flags")
        self._check(self.tree)

    def ends(self, text: str) -> int:
        """Bit i is set when a match may run from 0 to position i."""
        self.text = text
        self.all = (1 << len(text)) - 1  # positions with a character
        return self._run(self.tree, 1)

    def _refuse(self, why: str) -> InvalidAdapter:
        return InvalidAdapter(f"module pattern {self.pattern[:80]!a} {why}")

    def _check(self, items: Any) -> None:
        """Refuse what `_step` does not know, whether or not a name ever gets there."""
        for op, argument in items:
            match str(op):
                case "LITERAL" | "NOT_LITERAL" | "ANY" | "IN" | "AT":
                    pass
                case "BRANCH":
                    for branch in argument[1]:
                        self._check(branch)
                case "SUBPATTERN":
                    if argument[1] or argument[2]:
                        raise self._refuse("uses flags; write it without (?...) flags")
                    self._check(argument[3])
                case "MAX_REPEAT" | "MIN_REPEAT":
                    self._check(argument[2])
                case "ASSERT" | "ASSERT_NOT" if argument[0] > 0:
                    self._check(argument[1])
                case _:
                    raise self._refuse("uses look-behind, back-references or another feature not supported")

    def _run(self, items: Any, positions: int) -> int:
        for op, argument in items:
            if not positions:
                return 0
            positions = self._step(str(op), argument, positions)
        return positions

    def _step(self, op: str, argument: Any, positions: int) -> int:
        self.steps += 1
        if self.steps > _MAX_STEPS:
            raise self._refuse("takes too long to match; write it simpler, or list the modules")
        match op:
            case "LITERAL":
                code = chr(argument)
                return self._advance(positions, lambda c: c == code)
            case "NOT_LITERAL":
                code = chr(argument)
                return self._advance(positions, lambda c: c != code)
            case "ANY":
                return self._advance(positions, lambda c: c != "\n")
            case "IN":
                return self._advance(positions, lambda c: _in_class(c, argument))
            case "BRANCH":
                reached = 0
                for branch in argument[1]:
                    reached |= self._run(branch, positions)
                return reached
            case "SUBPATTERN":
                return self._run(argument[3], positions)
            case "MAX_REPEAT" | "MIN_REPEAT":
                low, high, inner = argument
                return self._repeat(low, int(high), inner, positions)
            case "AT":
                return self._at(str(argument), positions)
            case _:  # ASSERT, ASSERT_NOT
                kept = 0
                for i in range(len(self.text) + 1):
                    if positions >> i & 1 and bool(self._run(argument[1], 1 << i)) == (op == "ASSERT"):
                        kept |= 1 << i
                return kept

    def _advance(self, positions: int, accepts: Callable[[str], bool]) -> int:
        reached = 0
        positions &= self.all
        while positions:
            lowest = positions & -positions
            if accepts(self.text[lowest.bit_length() - 1]):
                reached |= lowest << 1
            positions ^= lowest
        return reached

    def _repeat(self, low: int, high: int, inner: Any, positions: int) -> int:
        for _ in range(low):
            before, positions = positions, self._run(inner, positions)
            if positions == before or not positions:
                break
        reached = fresh = positions
        count = low
        while fresh and count < high:
            fresh = self._run(inner, fresh) & ~reached
            reached |= fresh
            count += 1
        return reached

    def _at(self, where: str, positions: int) -> int:
        text, n = self.text, len(self.text)
        kept = 0
        for i in range(n + 1):
            if positions >> i & 1:
                word = [0 <= j < n and _CATEGORIES["CATEGORY_WORD"](text[j]) for j in (i - 1, i)]
                holds = {
                    "AT_BEGINNING": i == 0,
                    "AT_BEGINNING_STRING": i == 0,
                    "AT_END": i == n or (i == n - 1 and text[i] == "\n"),
                    "AT_END_STRING": i == n,
                    "AT_BOUNDARY": word[0] != word[1],
                    "AT_NON_BOUNDARY": word[0] == word[1],
                }[where]
                kept |= holds << i
        return kept


def _in_class(char: str, items: Any) -> bool:
    found, negated = False, False
    for op, argument in items:
        match str(op):
            case "NEGATE":
                negated = True
            case "LITERAL":
                found |= ord(char) == argument
            case "RANGE":
                found |= argument[0] <= ord(char) <= argument[1]
            case _:
                found |= _CATEGORIES[str(argument)](char)
    return found != negated
