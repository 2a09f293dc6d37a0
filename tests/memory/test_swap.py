"""Swap: blocks come back byte for byte, and no place has two owners."""

from __future__ import annotations

import random

import numpy as np
import pytest

from chiliad.errors import InvalidConfig
from chiliad.memory.swap import SwapSpace

LAYERS, PAGE = 3, 64


def space(blocks: int, num_pages: int = 60) -> tuple[SwapSpace, np.ndarray]:
    pages = np.random.default_rng(0).integers(0, 256, (num_pages, PAGE), np.uint8)
    return SwapSpace(pages, LAYERS, blocks * LAYERS * PAGE + 1), pages


def test_blocks_come_back_into_other_pages() -> None:
    swap, pages = space(4)
    table = np.array([[5, 9, 1], [2, 40, 7]], np.int32)
    before = pages[table].copy()
    places = swap.save(table)
    pages[table] = 0
    elsewhere = np.array([[50, 3, 11], [12, 13, 30]], np.int32)
    rest = np.delete(pages, elsewhere.reshape(-1), axis=0)
    swap.restore(places, elsewhere)
    assert (pages[elsewhere] == before).all()
    assert (np.delete(pages, elsewhere.reshape(-1), axis=0) == rest).all()
    assert swap.used_blocks == 2
    swap.free(places)
    assert swap.used_blocks == 0


def test_the_space_is_bounded() -> None:
    swap, _ = space(4)
    table = np.arange(9, dtype=np.int32).reshape(3, 3)
    held = swap.save(table)
    assert len(held) == 3
    assert swap.save(table) == []
    swap.check(held)
    held += swap.save(table[:1])
    swap.check(held)
    with pytest.raises(AssertionError):
        swap.check(held[1:])


def test_too_little_space_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="hold no block of 192 bytes"):
        space(0)


def test_any_history_returns_what_was_saved() -> None:
    swap, pages = space(20)
    rng = random.Random(1)
    live: list[tuple[list[int], np.ndarray]] = []
    for _ in range(500):
        if rng.random() < 0.55:
            table = np.array(rng.sample(range(60), LAYERS * rng.randint(1, 5)), np.int32).reshape(-1, LAYERS)
            before = pages[table].copy()
            if places := swap.save(table):
                live.append((places, before))
            pages[rng.randrange(60)] = rng.randrange(256)
        elif live:
            places, before = live.pop(rng.randrange(len(live)))
            table = np.array(rng.sample(range(60), before.shape[0] * LAYERS), np.int32).reshape(-1, LAYERS)
            swap.restore(places, table)
            assert (pages[table] == before).all()
            swap.free(places)
        swap.check([place for places, _ in live for place in places])


def test_the_cost_of_a_block_is_learned() -> None:
    now = iter(range(100))
    pages = np.zeros((6, PAGE), np.uint8)
    swap = SwapSpace(pages, LAYERS, 10**4, clock=lambda: 4.0 * next(now))
    table = np.arange(6, dtype=np.int32).reshape(2, 3)
    for _ in range(30):
        swap.free(swap.save(table))
    assert swap.block_seconds == pytest.approx(2.0, rel=0.01)
