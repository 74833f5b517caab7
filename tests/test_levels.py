# SPDX-License-Identifier: Apache-2.0
"""The level controller: choices, what always holds of them, and fixed profiles on links that change."""

from __future__ import annotations

import math
import random
from functools import cache

import pytest

from kvstore.errors import ConfigError
from kvstore.levels import Bandwidth, Option, break_even_bandwidth, plan
from tests.bandwidth_traces import LOSSES, Result, replay_fixed, replay_planned, traces

LOSSLESS = Option("lossless", 0.0, 600, 0.0)
Q4 = Option("q4", 0.002, 240, 0.0)
Q2 = Option("q2", 0.05, 120, 0.0)
SLOW = Option.recompute(100.0)
SEEDS = (0, 1)


def _names(chosen: list[Option]) -> list[str]:
    return [option.name for option in chosen]


@pytest.mark.parametrize(
    ("left_s", "name"),
    [(math.inf, "lossless"), (12.0, "lossless"), (11.99, "q4"), (4.8, "q4"), (4.79, "q2"), (2.4, "q2"), (-1.0, "q2")],
)
def test_takes_the_least_lossy_profile_that_arrives_in_time_and_else_the_smallest(left_s: float, name: str) -> None:
    assert _names(plan([[Q2, SLOW, LOSSLESS, Q4]] * 2, bandwidth=100.0, left_s=left_s)) == [name] * 2


def test_declines_a_stored_block_that_is_slower_than_computing_it_again() -> None:
    quick = Option.recompute(5.9)
    assert _names(plan([[LOSSLESS, quick], [LOSSLESS, SLOW]], bandwidth=100.0, left_s=math.inf)) == [
        "recompute",
        "lossless",
    ]
    assert _names(plan([[LOSSLESS, Q2, Option.recompute(1.1)]], bandwidth=100.0, left_s=0.0)) == ["recompute"]


def test_counts_decoding_as_time() -> None:
    slow_to_decode = Option("q4", 0.002, 240, 9.0)
    assert _names(plan([[slow_to_decode, Q2]], bandwidth=100.0, left_s=6.0)) == ["q2"]


def test_a_block_stored_in_one_form_only_is_taken_as_it_is() -> None:
    assert _names(plan([[Q2], [LOSSLESS, Q4, Q2]], bandwidth=100.0, left_s=math.inf)) == ["q2", "lossless"]


def test_nothing_left_to_come_is_an_empty_plan() -> None:
    assert plan([], bandwidth=1.0, left_s=0.0) == []


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, math.nan])
def test_refuses_a_bandwidth_that_is_not_positive(bandwidth: float) -> None:
    with pytest.raises(ConfigError, match="bandwidth"):
        plan([[LOSSLESS]], bandwidth=bandwidth, left_s=1.0)


def test_refuses_a_block_that_cannot_be_had() -> None:
    with pytest.raises(ConfigError, match="without options"):
        plan([[LOSSLESS], []], bandwidth=1.0, left_s=1.0)


@pytest.mark.parametrize(("loss", "nbytes", "work_s"), [(-1.0, 1, 0.0), (math.nan, 1, 0.0), (0.0, -1, 0.0), (0, 1, -1)])
def test_refuses_an_option_with_impossible_numbers(loss: float, nbytes: int, work_s: float) -> None:
    with pytest.raises(ConfigError, match="option q9"):
        Option("q9", loss, nbytes, work_s)


# What always holds


def _random_blocks(chance: random.Random) -> list[list[Option]]:
    """Blocks of several sizes, each stored in some profiles; most can be computed again."""
    blocks = []
    for _ in range(chance.randint(1, 12)):
        raw_nbytes = chance.randint(1000, 9000)
        stored = [
            Option(name, loss, int(raw_nbytes * size), raw_nbytes / chance.uniform(1e3, 1e5))
            for name, (loss, size) in LOSSES.items()
            if chance.random() < 0.7
        ]
        again = [Option.recompute(chance.uniform(0.5, 60.0))] if not stored or chance.random() < 0.8 else []
        blocks.append(stored + again)
    return blocks


def _total_s(chosen: list[Option], bandwidth: float) -> float:
    return sum(option.seconds(bandwidth) for option in chosen)


def _worst(chosen: list[Option], blocks: list[list[Option]]) -> float:
    """Largest loss beyond what each block costs at least."""
    return max(
        option.loss if option.loss > min(each.loss for each in options) else 0.0
        for option, options in zip(chosen, blocks, strict=True)
    )


@pytest.mark.parametrize("seed", range(40))
def test_more_bandwidth_or_more_time_is_never_answered_with_a_lossier_plan(seed: int) -> None:
    chance = random.Random(seed)
    blocks = [[option for option in options if option.nbytes] for options in _random_blocks(chance)]
    blocks = [options for options in blocks if options] or [[LOSSLESS]]
    least_s = _total_s(plan(blocks, 1e3, -math.inf), 1e3)
    for steps in ([(1e3 * 1.3**n, least_s) for n in range(20)], [(1e3, least_s * 1.2**n) for n in range(20)]):
        losses = [_worst(plan(blocks, bandwidth, left_s), blocks) for bandwidth, left_s in steps]
        assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("seed", range(40))
def test_on_a_steady_link_whatever_can_be_in_time_is(seed: int) -> None:
    chance = random.Random(seed)
    blocks, bandwidth = _random_blocks(chance), chance.uniform(200, 9000)
    least_s = _total_s(plan(blocks, bandwidth, -math.inf), bandwidth)
    least = sum(min(option.seconds(bandwidth) for option in options) for options in blocks)
    assert least_s == pytest.approx(least)  # out of time, it is as fast as any choice could be
    for deadline_s in (least_s * 1.000001, least_s * chance.uniform(1, 3)):
        now_s = 0.0
        for first in range(len(blocks)):
            option = plan(blocks[first:], bandwidth, deadline_s - now_s)[0]
            now_s += option.seconds(bandwidth)
        assert now_s <= deadline_s


# Bandwidth


def test_expects_the_prior_until_something_was_measured() -> None:
    bandwidth = Bandwidth(100.0, memory_s=10.0)
    bandwidth.note(0, 1.0, 0.0)
    bandwidth.note(100, 0.0, 0.0)
    assert bandwidth.expected(0.0) == 100.0
    bandwidth.note(100, 2.0, 2.0)
    assert bandwidth.expected(2.0) == 50.0


def test_believes_a_fall_at_once_and_a_rise_when_it_lasts() -> None:
    bandwidth = Bandwidth(1.0, memory_s=100.0)
    for second in range(4):
        bandwidth.note(100, 1.0, float(second))
    bandwidth.note(100, 10.0, 14.0)
    assert bandwidth.expected(14.0) == 10.0
    bandwidth.note(100, 1.0, 15.0)
    assert bandwidth.expected(15.0) == pytest.approx(400 / 13)
    for second in range(16, 20):
        bandwidth.note(100, 1.0, float(second))
    assert bandwidth.expected(20.0) == 100.0


def test_forgets_what_was_measured_long_ago() -> None:
    bandwidth = Bandwidth(100.0, memory_s=10.0)
    bandwidth.note(1, 1.0, 5.0)
    assert [bandwidth.expected(now_s) for now_s in (5.0, 15.0, 15.1)] == [1.0, 1.0, 100.0]


@pytest.mark.parametrize(("prior", "memory_s"), [(0.0, 1.0), (math.inf, 1.0), (math.nan, 1.0), (1.0, 0.0)])
def test_refuses_a_bandwidth_estimate_without_a_usable_prior(prior: float, memory_s: float) -> None:
    with pytest.raises(ConfigError, match="prior"):
        Bandwidth(prior, memory_s)


@pytest.mark.parametrize(
    ("raw", "stored", "codec_s", "bandwidth"),
    [(1000, 250, 0.5, 1500.0), (1000, 1000, 0.5, 0.0), (1000, 1100, 0.5, 0.0), (1000, 250, 0.0, math.inf)],
)
def test_coding_pays_below_the_break_even_bandwidth(raw: int, stored: int, codec_s: float, bandwidth: float) -> None:
    assert break_even_bandwidth(raw, stored, codec_s) == bandwidth


# Links that change


@cache
def _fixed(seed: int, link: str) -> dict[str, Result]:
    return {name: replay_fixed(traces(seed)[link], name) for name in LOSSES}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("link", ["steady", "step down", "sawtooth", "random walk", "outage"])
def test_misses_fewer_deadlines_than_any_fixed_profile_of_its_quality(link: str, seed: int) -> None:
    planned = replay_planned(traces(seed)[link])
    best = min(result.misses for result in _fixed(seed, link).values() if result.loss <= planned.loss)
    assert planned.misses <= best
    if link == "steady":
        assert planned.misses == 0
        assert planned.loss <= _fixed(seed, link)["q8"].loss
    else:
        assert planned.misses < best
