# SPDX-License-Identifier: Apache-2.0
"""Attention where blocks lie in host memory: exact when merged, and chosen when moving them would take longer."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings

from kvstore.errors import ConfigError, ShapeError
from kvstore.kernels import host_attention
from kvstore.kernels.host_attention import attend_on_host
from kvstore.kernels.host_cost import HostRates, HostWork, host_seconds, move_seconds, rates_of, stays_on_host
from kvstore.kernels.paged_reference import attend_rows
from kvstore.kernels.parts_reference import Part, merge_parts
from tests.paged_pools import Case, Geometry, geometries, make_case

WORK = HostWork(num_rows=4096, kv_heads=8, num_asking=32, key_dim=128, value_dim=128, itemsize=2)
SLOW_LINK = HostRates(host_nbytes_s=10e9, host_flops_s=100e9, link_nbytes_s=1e9, link_wait_s=20e-6)
FAST_LINK = dataclasses.replace(SLOW_LINK, link_nbytes_s=25e9)


def on_host(case: Case) -> Part:
    return attend_on_host(**{field.name: getattr(case, field.name) for field in dataclasses.fields(case)})


def reference(case: Case) -> Part:
    return attend_rows(**{field.name: getattr(case, field.name) for field in dataclasses.fields(case)})


@settings(max_examples=15, deadline=None)
@given(geometries())
def test_what_was_attended_on_either_side_merges_to_the_whole(geometry: Geometry) -> None:
    case = make_case(geometry)
    cut = geometry.num_rows // 3
    merged = merge_parts([on_host(case.of_rows(slice(0, cut))), reference(case.of_rows(slice(cut, None)))])
    torch.testing.assert_close(merged, reference(case), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("nbytes", [1, 4000, 1 << 20])
def test_chunks_merge_to_the_whole(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setattr(host_attention, "_CHUNK_NBYTES", nbytes)
    case = make_case(Geometry(num_rows=33, num_lists=1, has_bias=True))
    torch.testing.assert_close(on_host(case), reference(case), atol=2e-5, rtol=2e-5)


def test_keys_elsewhere_are_refused() -> None:
    case = make_case(Geometry(num_rows=3))
    with pytest.raises(ShapeError, match="meta"):
        on_host(dataclasses.replace(case, keys=case.keys.to("meta")))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_query_on_the_device_gets_its_part_there() -> None:
    case = make_case(Geometry(num_rows=33))
    out, sums = on_host(dataclasses.replace(case, query=case.query.cuda()))
    assert out.is_cuda
    torch.testing.assert_close((out.cpu(), sums.cpu()), reference(case))


def test_rows_move_over_a_fast_link_and_stay_behind_a_slow_one() -> None:
    assert stays_on_host(WORK, SLOW_LINK)
    assert not stays_on_host(WORK, FAST_LINK)
    assert WORK.nbytes == 4096 * 8 * 256 * 2
    assert WORK.flops == 2 * 4096 * 32 * 256
    assert move_seconds(WORK, SLOW_LINK) == pytest.approx(20e-6 + WORK.nbytes / 1e9)
    assert host_seconds(WORK, SLOW_LINK) == pytest.approx(40e-6 + WORK.nbytes / 10e9 + WORK.flops / 100e9)


def test_rows_that_many_forwards_attend_to_move_once() -> None:
    once, often = (dataclasses.replace(WORK, num_forwards=count) for count in (1, 100))
    assert stays_on_host(once, SLOW_LINK)
    assert not stays_on_host(often, SLOW_LINK)


def test_many_queries_move_rows_that_one_would_leave() -> None:
    assert not stays_on_host(dataclasses.replace(WORK, num_asking=32 * 64), SLOW_LINK)


def test_a_few_rows_move_as_a_crossing_costs_more_than_their_bytes() -> None:
    assert not stays_on_host(dataclasses.replace(WORK, num_rows=1), SLOW_LINK)


@pytest.mark.parametrize(
    "work", [WORK, dataclasses.replace(WORK, num_rows=0), dataclasses.replace(WORK, num_forwards=1e9)]
)
def test_without_a_device_all_stays(work: HostWork) -> None:
    assert stays_on_host(work, dataclasses.replace(SLOW_LINK, link_nbytes_s=None))


def test_rates_are_solved_from_two_times() -> None:
    alone = dataclasses.replace(SLOW_LINK, link_wait_s=0)  # what is timed on the CPU crosses nothing
    many = dataclasses.replace(WORK, num_asking=512)
    found = rates_of((WORK, host_seconds(WORK, alone)), (many, host_seconds(many, alone)), 1e9, 20e-6)
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(SLOW_LINK))


@pytest.mark.parametrize(("short_s", "long_s"), [(1.0, 1.0), (1.0, 0.5), (0.001, 10.0)])
def test_times_that_fit_no_rates_are_refused(short_s: float, long_s: float) -> None:
    many = dataclasses.replace(WORK, num_asking=64)
    with pytest.raises(ConfigError, match="no rates"):
        rates_of((WORK, short_s), (many, long_s), None, 0)


@pytest.mark.parametrize(
    "change", [{"host_nbytes_s": 0}, {"host_flops_s": float("nan")}, {"link_nbytes_s": -1}, {"link_wait_s": -1e-6}]
)
def test_rates_that_are_none_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        dataclasses.replace(SLOW_LINK, **change)
