# SPDX-License-Identifier: Apache-2.0
"""`kvstore inspect`: shows what a store knows of one stream, or of one of its blocks."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from datetime import datetime
from statistics import median
from typing import TYPE_CHECKING

from kvstore.cli import arguments, text
from kvstore.errors import ConfigError, CorruptRecordError
from kvstore.record import effective

if TYPE_CHECKING:
    from kvstore.cli.stored import Shelf
    from kvstore.tiers.manifest import Manifest, StreamHeader

Json = dict[str, object]


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its arguments."""
    parser = commands.add_parser(
        "inspect", help="show a stream or a block", description="Show what is known of a stream, or of one block."
    )
    arguments.add_store(parser, stream=True)
    parser.add_argument("--block", type=arguments.index, metavar="I", help="show the block of this index, from 0")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Show the stream, or the block."""
    from kvstore.cli.stored import open_shelf

    with open_shelf(options.store) as shelf:
        manifest = shelf.manifest(options.stream)
        if options.block is None:
            shown, lines = _stream(shelf, manifest)
        else:
            shown, lines = _block(shelf, manifest, options.block)
    print(json.dumps(shown, indent=1) if options.json else "\n".join(lines))
    return 0


def _stream(shelf: Shelf, manifest: Manifest) -> tuple[Json, list[str]]:
    header = manifest.header
    statistics, calibration = _statistics(shelf, manifest), _calibration(shelf, header)
    shown: Json = {
        "name": header.name,
        "is_complete": manifest.is_complete,
        "created_unix_s": header.created_unix_s,
        "profile": str(header.profile),
        "block_tokens": header.block_tokens,
        "prefill": header.prefill,
        "source": header.source,
        "cursor": manifest.cursor,
        "spec": asdict(header.spec),
        "fingerprint": header.spec.fingerprint,
        "calibration": calibration,
        "blocks": statistics,
    }
    model = {**asdict(header.spec), "fingerprint": header.spec.fingerprint}
    created = datetime.fromtimestamp(header.created_unix_s).astimezone().isoformat(" ", "seconds")
    groups = [
        ("stream", [("name", header.name), ("created", created), ("state", _state(manifest))]),
        ("written with", [(name, str(shown[name])) for name in ("profile", "block_tokens", "prefill")]),
        ("source", [(name, str(value)) for name, value in header.source.items()]),
        ("cursor", [(name, str(value)) for name, value in manifest.cursor.items()]),
        ("model", [(name, str(value)) for name, value in model.items()]),
        ("calibration of the model", [(name, str(value)) for name, value in (calibration or {}).items()]),
        ("blocks", [(name, _figure(name, value)) for name, value in statistics.items()]),
    ]
    return shown, _listed(groups)


def _calibration(shelf: Shelf, header: StreamHeader) -> Json | None:
    """What new blocks of a lossy stream are coded with; None for exact streams and before there is any."""
    decision = shelf.decision(header.spec) if header.profile.is_lossy else None
    if decision is None:
        return None
    judged = effective(header.profile, shelf.has_bases(header.spec))
    return {
        "object": decision.calibration.hex(),
        "tokens": decision.num_tokens,
        "source": decision.source,
        "coded_as": str(judged),
        "divergence": decision.divergence.get(judged),
        "exact_keys": judged in decision.exact_keys,
    }


def _statistics(shelf: Shelf, manifest: Manifest) -> Json:
    sizes = [entry.num_tokens for entry in manifest.entries]
    tokens_of = {entry.key: entry.num_tokens for entry in manifest.entries}
    found = [block for block in shelf.blocks(list(tokens_of)) if block is not None]
    raw_nbytes = sum(block.record.num_tokens for block in found) * manifest.header.spec.token_nbytes
    record_nbytes = sum(block.record.record_nbytes for block in found)
    return {
        "count": len(sizes),
        "missing": len(tokens_of) - len(found),
        "tokens": manifest.num_tokens,
        "tokens_min": min(sizes, default=0),
        "tokens_median": median(sizes) if sizes else 0,
        "tokens_max": max(sizes, default=0),
        "raw_nbytes": raw_nbytes,
        "record_nbytes": record_nbytes,
        "extent_nbytes": sum(block.record.extent.nbytes for block in found),
        "ratio": raw_nbytes / record_nbytes if record_nbytes else None,
    }


def _block(shelf: Shelf, manifest: Manifest, index: int) -> tuple[Json, list[str]]:
    from kvstore.codec import Codec, Coding

    entries, name = manifest.entries, manifest.header.name
    if index >= len(entries):
        raise ConfigError(f"stream {name!r} has {text.count(len(entries), 'block')}; there is no block {index}")
    entry = entries[index]
    (found,) = shelf.blocks([entry.key])
    if found is None or found.directory is None:
        raise CorruptRecordError(f"stream {name!r}: block {index} is not stored; `kvstore verify` says what else")
    info = Codec.probe(found.directory)
    record, raw_nbytes = found.record, sum(plane.raw_nbytes for plane in info.planes)
    planes = [
        {
            "layer": number // 2,
            "plane": "KV"[number % 2],
            "coding": plane.coding.name.lower(),
            "offset": plane.offset,
            "nbytes": plane.nbytes,
            "raw_nbytes": plane.raw_nbytes,
            "ratio": plane.raw_nbytes / plane.nbytes if plane.nbytes and plane.coding is not Coding.BASIS else None,
        }
        for number, plane in enumerate(info.planes)
    ]
    shown: Json = {
        "stream": name,
        "index": index,
        "key": entry.key.hex(),
        "start_s": entry.start_s,
        "end_s": entry.end_s,
        "group": entry.group,
        "first_token": entry.first_token,
        "tokens": entry.num_tokens,
        "profile": str(info.profile),
        "calibration": info.calibration_id.hex() if any(info.calibration_id) else None,
        "format": ".".join(map(str, info.version)),
        "file": record.extent.file_id,
        "offset": record.extent.offset,
        "raw_nbytes": raw_nbytes,
        "record_nbytes": record.record_nbytes,
        "extent_nbytes": record.extent.nbytes,
        "ratio": raw_nbytes / record.record_nbytes if record.record_nbytes else None,
        "planes": planes,
    }
    fields = [(name, _figure(name, value)) for name, value in shown.items() if name != "planes"]
    fields.insert(3, ("span", text.span(entry.start_s, entry.end_s)))
    titles = ("plane", "coding", "offset", "size", "raw", "ratio")
    rows = [
        (
            f"{plane['plane']}{plane['layer']}",
            str(plane["coding"]),
            f"{plane['offset']:,}",
            *(_figure(key, plane[key]) for key in ("nbytes", "raw_nbytes", "ratio")),
        )
        for plane in planes
    ]
    return shown, [*text.facts(fields), "", *text.table(titles, rows, left=2)]


def _state(manifest: Manifest) -> str:
    from kvstore.cli.stored import read_until

    return "complete" if manifest.is_complete else f"resumable at {text.duration(read_until(manifest))}"


def _listed(groups: list[tuple[str, list[tuple[str, str]]]]) -> list[str]:
    lines: list[str] = []
    for title, pairs in groups:
        if pairs:
            lines += ["", title] if lines else [title]
            lines += [f"  {line}" for line in text.facts((name, text.printable(value)) for name, value in pairs)]
    return lines


def _figure(name: str, value: object) -> str:
    """A figure by its name: sizes in units, ratios with two places, the rest as it is."""
    if isinstance(value, int) and name.endswith("nbytes"):
        return text.size(value)
    return f"{value:.2f}" if isinstance(value, float) and name == "ratio" else text.printable(value)
