# SPDX-License-Identifier: Apache-2.0
"""What a store tells those who watch it: Prometheus, other processes, log readers, tracers."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from kvstore.store import Outcome, Store
from kvstore.telemetry.fault_log import log_fault
from kvstore.telemetry.histogram import NUM_BUCKETS, Histogram, bound_s
from kvstore.watch.live import FOLDER, publish, read_live
from kvstore.watch.metrics import serve
from tests.store_blocks import block_key, empty_slot, make_slot, open_store

PUBLISHER = """
import sys, time
from pathlib import Path
from kvstore.watch.live import publish
from kvstore.store import Access, Store
folder = Path(sys.argv[1])
with Store.open(folder, access=Access.READ) as store, publish(store, folder, "watcher", interval_s=0.01):
    print("ready", flush=True)
    time.sleep(60)
"""


def _use(store: Store) -> None:
    store.put([block_key(1)], [make_slot(1)], [40])
    store.get([block_key(1), block_key(2)], [empty_slot(), empty_slot()])
    store.get([block_key(1)], [empty_slot()])


def _samples(port: int) -> dict[tuple[str, ...], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, *(value for label, value in sorted(sample.labels.items()) if label != "store")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_prometheus_reads_what_the_store_counted(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        port = serve(store, 0)
        _use(store)
        seen, stats = _samples(port), store.stats()

        assert seen["kvstore_lookups_total", "hit", "disk"] == stats.disk.hits == 1
        assert seen["kvstore_lookups_total", "miss", "disk"] == stats.disk.misses == 1
        assert seen["kvstore_lookups_total", "hit", "host"] == stats.host.hits == 1
        assert seen["kvstore_bytes_total", "write", "disk"] == stats.disk.written_nbytes > 0
        assert seen["kvstore_stored_blocks",] == 1
        assert seen["kvstore_batch_seconds_count", "read", "disk"] == 1
        assert seen["kvstore_batch_seconds_bucket", "+Inf", "read", "disk"] == 1
        assert seen["kvstore_batch_seconds_sum", "read", "disk"] == pytest.approx(stats.disk.read_s)
    assert not _samples(port), "a closed store has nothing to tell"


@given(st.lists(st.floats(0, 1e4), min_size=1), st.floats(0, 1))
def test_a_quantile_is_never_below_the_true_one_nor_twice_it(seconds: list[float], share: float) -> None:
    histogram = Histogram()
    for each in seconds:
        histogram = histogram.with_one(each)
    wanted = sorted(seconds)[max(0, -int(-share * len(seconds) // 1) - 1)]
    found = histogram.quantile_s(share)

    assert histogram.count == len(seconds)
    assert found >= min(wanted, bound_s(NUM_BUCKETS - 1))
    assert found <= max(2 * wanted, bound_s(0)) or found == bound_s(0)


def test_another_process_sees_the_counters_until_the_process_is_gone(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        _use(store)
    command = [sys.executable, "-c", PUBLISHER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            deadline = time.monotonic() + 30
            while not (found := read_live(tmp_path)) and time.monotonic() < deadline:
                time.sleep(0.01)
            seen = [(each.process_id, each.command, each.stats.num_blocks) for each in found]
            assert seen == [(child.pid, "watcher", 1)]
        finally:
            child.kill()
    assert read_live(tmp_path) == []
    assert list((tmp_path / FOLDER).iterdir()), "a killed process leaves its file"
    with open_store(tmp_path) as store, publish(store, tmp_path, "next"):
        assert len(list((tmp_path / FOLDER).iterdir())) == 1, "the next one clears it away"


def test_those_who_begin_to_publish_at_once_are_all_seen(tmp_path: Path) -> None:
    with open_store(tmp_path) as store, ExitStack() as publishing:
        together = threading.Barrier(16)

        def begin(number: int) -> AbstractContextManager[None]:
            together.wait(30)
            publisher = publish(store, tmp_path, str(number), interval_s=0.05)
            publisher.__enter__()
            return publisher

        with ThreadPoolExecutor(16) as threads:
            for publisher in threads.map(begin, range(16)):
                publishing.push(publisher)
        deadline = time.monotonic() + 30
        while len(found := read_live(tmp_path)) < 16 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert {each.command for each in found} == {str(number) for number in range(16)}


@pytest.mark.parametrize("damage", [b"", b"[]", b"{", b'{"stats": 1}', b"\xff" * 100, b"[" * 10_000])
def test_what_is_no_snapshot_is_passed_over(tmp_path: Path, damage: bytes) -> None:
    with open_store(tmp_path) as store, publish(store, tmp_path, "this"):
        deadline = time.monotonic() + 30
        while not read_live(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.01)
        (path,) = (tmp_path / FOLDER).iterdir()
        path.write_bytes(damage)
        assert read_live(tmp_path) == []


def test_a_folder_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        (tmp_path / FOLDER).write_text("a file where the folder would be")
        with publish(store, tmp_path, "this"):
            _use(store)
        assert read_live(tmp_path) == []


def test_stats_of_the_command_line_follow_a_running_process(tmp_path: Path) -> None:
    with open_store(tmp_path) as store, publish(store, tmp_path, "ingest lecture", interval_s=0.05):
        _use(store)
        time.sleep(0.2)
        command = [sys.executable, "-m", "kvstore", "stats", "--store", str(tmp_path)]
        once = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        plain = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60, check=True).stdout
        with subprocess.Popen([*command, "--watch", "0.1"], stdout=subprocess.PIPE, text=True) as watching:
            assert watching.stdout is not None
            first = [watching.stdout.readline() for _ in once.splitlines()]
            again = [watching.stdout.readline() for _ in once.splitlines()]
            watching.send_signal(signal.SIGINT)
            watching.communicate(timeout=60)

    assert "1 block;" in once
    assert f"ingest lecture (process {os.getpid()})" in once
    assert re.search(r"disk +1 +1 +0 +0", once)
    assert json.loads(plain)["processes"][0]["stats"]["disk"]["hits"] == 1
    assert re.search(r"disk .* - +-$", "".join(first), re.MULTILINE), "nothing to compare with"
    assert re.search(r"disk .* 0 B +0 B$", "".join(again), re.MULTILINE), "nothing moved in between"
    assert watching.returncode == 130


def test_a_damaged_block_is_logged_with_its_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_store(tmp_path) as store:
        store.put([block_key(1)], [make_slot(1)], [40])
    (file,) = (tmp_path / "extents").iterdir()
    with file.open("r+b") as extents:
        extents.seek(5000)
        extents.write(b"damage")
    with caplog.at_level(logging.WARNING, "kvstore.faults"), open_store(tmp_path) as store:
        assert store.get([block_key(1)], [empty_slot()]) == [Outcome.DAMAGED]
    (line,) = [json.loads(record.getMessage()) for record in caplog.records]

    assert (line["event"], line["store"], line["key"]) == ("block damaged", str(tmp_path), block_key(1).hex())
    assert "checksum" in line["reason"]


def test_a_tracer_sees_what_is_fetched_and_written(tmp_path: Path) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    with open_store(tmp_path) as store:
        _use(store)

    seen = [(each.name, dict(each.attributes or {})) for each in exporter.get_finished_spans()]
    assert seen == [
        ("kvstore.write", {"kvstore.blocks": 1}),
        ("kvstore.fetch", {"kvstore.blocks": 2}),
        ("kvstore.fetch", {"kvstore.blocks": 1}),
    ]


def test_faults_are_lines_of_json_and_no_flood(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "kvstore.faults"):
        for number in range(100):
            log_fault("test of a flood", key=number)
        time.sleep(1.1)
        log_fault("test of a flood", key=100)

    assert [json.loads(record.getMessage()) for record in caplog.records] == [
        {"event": "test of a flood", "key": 0},
        {"event": "test of a flood", "key": 100, "more": 99},
    ]
