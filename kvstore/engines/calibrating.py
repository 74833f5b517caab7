# SPDX-License-Identifier: Apache-2.0
"""Calibrates a model at hand: measures its keys and values, how it minds errors in them, and what profiles do to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from kvstore.bases import BasisSums
from kvstore.calibration import MIN_TOKENS, SINK_TOKENS, Calibration, calibrate
from kvstore.codec import Codec, Profile, Steps
from kvstore.decision import KL_AIMS, KL_LIMITS, Decision
from kvstore.engines.anatomy import spec_of
from kvstore.engines.judging import Judge
from kvstore.engines.loading import LanguageModel
from kvstore.engines.past import Run, read_run, sample_continuation
from kvstore.engines.sensitivity import log_steps
from kvstore.errors import ConfigError, CorruptRecordError
from kvstore.layout import BlockLayout
from kvstore.moments import Moments
from kvstore.record import STEPS
from kvstore.store import FetchRequest, Store, check_spec

NUM_FITTED = 4
"""Runs that a calibration is made from; one more is kept apart to judge it by."""
RUN_TOKENS = MIN_TOKENS // NUM_FITTED + SINK_TOKENS
CONTINUATION_TOKENS = 128
NEEDED_TOKENS = (NUM_FITTED + 1) * (RUN_TOKENS + CONTINUATION_TOKENS)
"""Tokens of a text or stream that calibrating takes."""

_SEED = 0
_COARSER = ((6, 5), (5, 4), (3, 2))
"""By how many eighths of an octave steps of keys and values may be coarser than usual, where channels are weighed by
how the model minds errors: that is worth about as much."""


def runs_of_text(language_model: LanguageModel, ids: Sequence[int]) -> list[Run]:
    """Let a model read pieces from all over a text.

    Args:
        language_model: the model.
        ids: token ids of the text.

    Raises:
        ConfigError: the text is too short.
    """
    runs = []
    for start in _starts(len(ids), RUN_TOKENS + CONTINUATION_TOKENS):
        piece = torch.tensor([list(ids[start : start + RUN_TOKENS + CONTINUATION_TOKENS])])
        runs.append(read_run(language_model.model, piece[:, :RUN_TOKENS], piece[:, RUN_TOKENS:]))
    return runs


def runs_of_stream(language_model: LanguageModel, store: Store, name: str, layout: BlockLayout) -> list[Run]:
    """Take pieces from all over a stored stream; the model goes on behind each by itself.

    Args:
        language_model: the model that wrote the stream.
        store: opened with the stream's layout.
        name: the stream.
        layout: the stream's.

    Raises:
        SpecMismatchError: another model wrote it.
        ConfigError: it is too short, or its blocks are not exact.
        CorruptRecordError: a block is damaged or gone.
    """
    manifest = store.manifest(name)
    check_spec(manifest.header, spec_of(language_model.model))
    if manifest.header.profile.is_lossy:
        raise ConfigError(f"stream {name!r} holds {manifest.header.profile} blocks; only exact ones can be measured")
    generator = torch.Generator().manual_seed(_SEED)
    start_id = language_model.encode("\n")[-1]
    runs = []
    for start in _starts(manifest.num_tokens, RUN_TOKENS):
        keys, values = _fetch_tokens(store, name, layout, start)
        keys, values = keys.to(language_model.device), values.to(language_model.device)
        ids = sample_continuation(language_model.model, keys, values, start_id, CONTINUATION_TOKENS, generator)
        runs.append(Run(keys, values, ids, first_token=start))
    return runs


def calibrate_model(
    language_model: LanguageModel, runs: Sequence[Run], layout: BlockLayout, source: str, *, with_bases: bool = False
) -> tuple[Calibration, Decision]:
    """Make a model's calibration and decide which profiles may have lossy keys.

    Args:
        language_model: the model; left as it was.
        runs: from `runs_of_text` or `runs_of_stream`; the last one is judged by.
        layout: how streams will be cut.
        source: where the runs came from, in words.
        with_bases: whether to make what profile `pca` needs; left out for models of too many channels.
    """
    spec = layout.spec
    fitted = runs[:NUM_FITTED]
    sizes = (spec.num_layers, spec.kv_heads, spec.key_dim, spec.value_dim)
    moments = Moments(*sizes)
    bases = BasisSums(*sizes, MIN_TOKENS) if with_bases else None
    for run in fitted:
        first = max(SINK_TOKENS - run.first_token, 0)
        for sums in (moments, bases):
            if sums is not None:
                sums.add(run.keys[:, :, first:], run.values[:, :, first:])
    weights = log_steps(language_model.model, fitted, torch.Generator().manual_seed(_SEED))
    calibration = calibrate(moments, weights, bases=bases)
    judge = Judge(language_model.model, runs[-1], layout)
    divergence, chosen, exact_keys = {}, {}, {}
    for name, limit in KL_LIMITS.items():
        profile = Profile(name)
        if profile is Profile.PCA and not calibration.has_bases:
            continue
        steps, divergence[name] = _coarsest(judge, layout, profile, calibration)
        if steps != STEPS[profile]:
            chosen[name] = (steps.key_mult, steps.value_mult)
        if not divergence[name] <= limit:
            exact_keys[name] = judge.divergence(Codec(layout, profile, calibration, steps, exact_keys=True))
    return calibration, Decision(calibration.id, moments.num_tokens, source, divergence, chosen, exact_keys)


def _coarsest(judge: Judge, layout: BlockLayout, profile: Profile, calibration: Calibration) -> tuple[Steps, float]:
    """The coarsest steps of those tried that stay within the profile's aim, else its usual ones; and the divergence."""
    usual = STEPS[profile]
    for key_less, value_less in _COARSER if profile in KL_AIMS else ():
        steps = Steps(usual.key_mult - key_less, usual.value_mult - value_less)
        found = judge.divergence(Codec(layout, profile, calibration, steps))
        if found <= KL_AIMS[profile]:
            return steps, found
    return usual, judge.divergence(Codec(layout, profile, calibration))


def _starts(num_tokens: int, length: int) -> Iterator[int]:
    """Where to cut pieces of `length`, evenly spread."""
    count = NUM_FITTED + 1
    if num_tokens < count * length:
        raise ConfigError(f"{num_tokens:,} tokens are too few to calibrate with; {count * length:,} are needed")
    return (index * (num_tokens - length) // (count - 1) for index in range(count))


def _fetch_tokens(store: Store, name: str, layout: BlockLayout, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[num_layers, kv_heads, RUN_TOKENS, dim]` of a stream from token `start` on."""
    entries = [
        entry
        for entry in store.manifest(name).entries
        if entry.first_token < start + RUN_TOKENS and entry.first_token + entry.num_tokens > start
    ]
    slots = [torch.zeros(layout.slot_nbytes, dtype=torch.uint8) for _ in entries]
    report = store.fetch([FetchRequest(entry.key, slot) for entry, slot in zip(entries, slots, strict=True)])
    for entry, outcome in zip(entries, report.outcomes, strict=True):
        if not outcome.is_hit:
            raise CorruptRecordError(f"stream {name!r}: block {entry.index} cannot be read; see `kvstore verify`")
    first = start - entries[0].first_token
    keys, values = (
        torch.cat([part(slot)[:, :, : entry.num_tokens] for entry, slot in zip(entries, slots, strict=True)], dim=2)
        for part in (layout.keys, layout.values)
    )
    return keys[:, :, first : first + RUN_TOKENS], values[:, :, first : first + RUN_TOKENS]
