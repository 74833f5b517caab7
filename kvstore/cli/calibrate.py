# SPDX-License-Identifier: Apache-2.0
"""`kvstore calibrate`: measures a model's keys and values, and which lossy profiles it bears."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kvstore.cli import arguments, text
from kvstore.cli.heap import release_free_memory
from kvstore.cli.progress import Progress
from kvstore.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvstore.calibration import Calibration
    from kvstore.decision import Decision
    from kvstore.engines.loading import LanguageModel
    from kvstore.engines.past import Run
    from kvstore.layout import BlockLayout
    from kvstore.spec import ModelSpec

_BLOCK_TOKENS = 128


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its arguments."""
    parser = commands.add_parser(
        "calibrate",
        help="prepare lossy profiles for a model",
        description="Measure what a model's keys and values look like and how much each lossy profile changes what it "
        "says. New blocks of lossy streams are then coded with the result; stored blocks stay as they are.",
    )
    arguments.add_store(parser, stream=None)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--stream", type=arguments.text, metavar="NAME", help="measure the blocks of an exact stream")
    source.add_argument("--text", type=arguments.path, metavar="FILE", help="let the model read a text file")
    source.add_argument("--video", type=arguments.path, metavar="FILE", help="let the model read a video's words")
    arguments.add_model(parser)
    parser.add_argument("--bases", action="store_true", help="also make what profile pca needs; takes many megabytes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Calibrate; see `kvstore.engines.calibrating`."""
    from kvstore.bases import MAX_CHANNELS
    from kvstore.calibration import can_have_bases
    from kvstore.cli.stored import find_stream
    from kvstore.engines.anatomy import spec_of
    from kvstore.layout import BlockLayout
    from kvstore.video.model import load

    block_tokens = _BLOCK_TOKENS
    if options.stream is not None:
        block_tokens = find_stream(options.store, options.stream).header.block_tokens
    words = _read_text(options.text) if options.text is not None else ""
    with Progress(sys.stderr) as progress:
        progress.note("loading the model")
        language_model = load(options.model)
        spec = spec_of(language_model.model)
        if options.bases and not can_have_bases(spec):
            channels = spec.kv_heads * max(spec.key_dim, spec.value_dim)
            raise ConfigError(
                f"--bases: a layer of this model has {channels:,} channels, more than the {MAX_CHANNELS:,} of a basis"
            )
        layout = BlockLayout(spec, block_tokens)
        progress.note("measuring")
        calibration, decision = _calibrate(options, language_model, layout, words, progress)
    shown = _as_json(spec, calibration, decision)
    print(json.dumps(shown, indent=1) if options.json else "\n".join(_as_text(spec, calibration, decision)))
    return 0


def _calibrate(
    options: argparse.Namespace, language_model: LanguageModel, layout: BlockLayout, words: str, progress: Progress
) -> tuple[Calibration, Decision]:
    from kvstore.engines.calibrating import NEEDED_TOKENS, calibrate_model, runs_of_stream, runs_of_text
    from kvstore.store import Access, Store
    from kvstore.video.words import read_words

    with Store.open(options.store, access=Access.WRITE, layout=layout, host_nbytes=2 * layout.slot_nbytes) as store:
        runs: Iterator[Run]
        if options.stream is not None:
            source = f"stream {options.stream}"
            runs = runs_of_stream(language_model, store, options.stream, layout)
        elif options.video is not None:
            source = options.video.name
            runs = runs_of_text(language_model, read_words(options.video, language_model.encode, NEEDED_TOKENS))
        else:
            source = options.text.name
            runs = runs_of_text(language_model, language_model.encode(words))

        def on_step(share: float) -> None:
            progress.show(share, ["calibrating"])
            release_free_memory()

        # Streams whose blocks are coded in bases by now are not to lose them unasked.
        with_bases = options.bases or store.calibrations.has_bases(layout.spec)
        calibration, decision = calibrate_model(language_model, runs, layout, source, on_step, with_bases=with_bases)
        store.calibrations.keep(layout.spec, calibration, decision)
    return calibration, decision


def _read_text(path: Path) -> str:
    """Read a file before the seconds that loading a model takes."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text in UTF-8") from error


def _as_json(spec: ModelSpec, calibration: Calibration, decision: Decision) -> dict[str, object]:
    return {
        "model": spec.fingerprint,
        "calibration": calibration.id.hex(),
        "nbytes": len(calibration.data),
        "source": decision.source,
        "tokens": decision.num_tokens,
        "divergence": decision.divergence,
        "steps": decision.steps,
        "exact_keys": decision.exact_keys,
    }


def _as_text(spec: ModelSpec, calibration: Calibration, decision: Decision) -> list[str]:
    from kvstore.decision import KL_LIMITS
    from kvstore.record import STEPS, Profile

    rows = []
    for name, found in decision.divergence.items():
        exact = decision.exact_keys.get(name)
        usual = STEPS[Profile(name)]
        key_mult, value_mult = decision.steps.get(name, (usual.key_mult, usual.value_mult))
        keys = "lossy" if exact is None else f"exact: {exact:.4f}"
        rows.append((name, keys, f"{key_mult}/{value_mult}", f"{found:.4f}", f"{KL_LIMITS[name]}"))
    return [
        f"calibrated {text.model(spec)} from {text.count(decision.num_tokens, 'token')} of "
        f"{text.printable(decision.source)}: {text.size(len(calibration.data))}, {calibration.id.hex()}",
        "",
        *text.table(("profile", "keys", "steps", "divergence", "at most"), rows, left=3),
    ]
