# SPDX-License-Identifier: Apache-2.0
"""Calibrates a model at hand: measures its keys and values, how it minds errors in them, and what profiles do to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from kvstore.bases import BasisSums
from kvstore.calibration import MIN_TOKENS, SINK_TOKENS, Calibration, calibrate
from kvstore.codec import Codec, Profile, Steps
from kvstore.decision import KL_AIMS, KL_LIMITS, Decision
from kvstore.engines.anatomy import spec_of
from kvstore.engines.judging import Judge
from kvstore.engines.loading import LanguageModel
from kvstore.engines.past import Run, read_run, sample_continuation
from kvstore.engines.sensitivity import Sensitivity
from kvstore.errors import CalibrationError, ConfigError, CorruptRecordError
from kvstore.layout import BlockLayout
from kvstore.moments import Moments
from kvstore.record import STEPS
from kvstore.store import FetchRequest, Store, check_spec

NUM_FITTED, FITTED_TOKENS = 4, MIN_TOKENS // 4 + SINK_TOKENS
"""Runs that a calibration is made from, and tokens of each."""
FITTED_CONTINUATION = 128

NUM_JUDGED, JUDGED_TOKENS = 2, 768
"""Runs that are kept apart to judge profiles by, and tokens of each."""
JUDGED_CONTINUATION = 512
"""The first tokens behind lossy ones mind most, and a mean over few is noisy: over 128 it is twice that over 512. How
many tokens are behind matters little."""

_LENGTHS = NUM_FITTED * ((FITTED_TOKENS, FITTED_CONTINUATION),) + NUM_JUDGED * ((JUDGED_TOKENS, JUDGED_CONTINUATION),)
_PLACES = (0, 4, 1, 2, 5, 3)
"""Order of the runs in a text: those to judge by lie between the others."""

NEEDED_TOKENS = sum(map(sum, _LENGTHS))
"""Tokens of a text that calibrating takes."""

_SEED = 0
_COARSER = ((6, 5), (5, 4), (4, 3), (3, 2), (2, 1))
"""By how many eighths of an octave steps of keys and values may be coarser than usual, where channels are weighed by
how the model minds errors: that is worth about as much as the first."""

_MOST_TRIED = 4
"""Rungs of it that are tried for a profile, ends included."""

OnStep = Callable[[float], None]
"""Told what share of a calibration is done."""


def runs_of_text(language_model: LanguageModel, ids: Sequence[int]) -> Iterator[Run]:
    """Let a model read pieces from all over a text, one whenever a run is asked for; those to judge by come last.

    Args:
        language_model: the model.
        ids: token ids of the text.

    Raises:
        ConfigError: the text is too short.
    """
    starts = _starts(len(ids), [sum(lengths) for lengths in _LENGTHS])

    def runs() -> Iterator[Run]:
        for start, lengths in zip(starts, _LENGTHS, strict=True):
            piece = torch.tensor([list(ids[start : start + sum(lengths)])])
            yield read_run(language_model.model, *piece.split(lengths, dim=1))

    return runs()


def runs_of_stream(language_model: LanguageModel, store: Store, name: str, layout: BlockLayout) -> Iterator[Run]:
    """Take pieces from all over a stored stream; the model goes on behind each by itself. See `runs_of_text`.

    Args:
        language_model: the model that wrote the stream.
        store: opened with the stream's layout; open until the last run was taken.
        name: the stream.
        layout: the stream's.

    Raises:
        SpecMismatchError: another model wrote it.
        ConfigError: it is too short, or its blocks are not exact.
        CorruptRecordError: a block is damaged or gone; raised by the run that needs it.
    """
    manifest = store.manifest(name)
    check_spec(manifest.header, spec_of(language_model.model))
    if manifest.header.profile.is_lossy:
        raise ConfigError(f"stream {name!r} holds {manifest.header.profile} blocks; only exact ones can be measured")
    generator = torch.Generator().manual_seed(_SEED)
    start_id = language_model.encode("\n")[-1]
    starts = _starts(manifest.num_tokens, [num_tokens for num_tokens, _ in _LENGTHS])

    def runs() -> Iterator[Run]:
        for start, (num_tokens, count) in zip(starts, _LENGTHS, strict=True):
            keys, values = _fetch_tokens(store, name, layout, range(start, start + num_tokens))
            keys, values = keys.to(language_model.device), values.to(language_model.device)
            ids = sample_continuation(language_model.model, keys, values, start_id, count, generator)
            yield Run(keys, values, ids, first_token=start)

    return runs()


@contextmanager
def _failures_named() -> Iterator[None]:
    """Turn what torch raises into an error of ours: it has no narrower type for most failures."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        raise CalibrationError(
            f"the model was not calibrated, which takes gradients and more memory than reading does: {error}"
        ) from error


@_failures_named()
def calibrate_model(
    language_model: LanguageModel,
    runs: Iterable[Run],
    layout: BlockLayout,
    source: str,
    on_step: OnStep = lambda share: None,
    *,
    with_bases: bool = False,
) -> tuple[Calibration, Decision]:
    """Make a model's calibration and decide which profiles may have lossy keys.

    Args:
        language_model: the model; left as it was.
        runs: from `runs_of_text` or `runs_of_stream`; only one that is fitted to is held at a time.
        layout: how streams will be cut.
        source: where the runs came from, in words.
        on_step: called several times; calibrating takes about as long as reading ten times the runs' tokens.
        with_bases: whether to make what profile `pca` needs; left out for models of too many channels.

    Raises:
        CalibrationError: too little memory, no gradients, logits that are not understood or no numbers.
    """
    spec = layout.spec
    progress = _Steps(NUM_FITTED + NUM_JUDGED + _MOST_TRIED * len(KL_LIMITS), on_step)
    sizes = (spec.num_layers, spec.kv_heads, spec.key_dim, spec.value_dim)
    moments = Moments(*sizes)
    bases = BasisSums(*sizes, MIN_TOKENS) if with_bases else None
    sensitivity = Sensitivity(language_model.model, torch.Generator().manual_seed(_SEED))
    judged = []
    for number, run in enumerate(runs):
        if number < NUM_FITTED:
            first = max(SINK_TOKENS - run.first_token, 0)
            for sums in (moments, bases):
                if sums is not None:
                    sums.add(run.keys[:, :, first:], run.values[:, :, first:])
            sensitivity.add(run)
        else:
            judged.append(run)
        progress.done()
    calibration = calibrate(moments, sensitivity.log_steps(), bases=bases)
    judge = Judge(language_model.model, judged, layout)
    divergence, chosen, exact_keys = {}, {}, {}
    for name, limit in KL_LIMITS.items():
        profile = Profile(name)
        if profile is Profile.PCA and not calibration.has_bases:
            progress.done(_MOST_TRIED)
            continue
        tried, divergence[name] = _coarsest(judge, layout, profile, calibration, progress)
        if tried != STEPS[profile]:
            chosen[name] = (tried.key_mult, tried.value_mult)
        if not divergence[name] <= limit:
            exact_keys[name] = judge.divergence(Codec(layout, profile, calibration, tried, exact_keys=True))
        if not math.isfinite(divergence[name]) or not math.isfinite(exact_keys.get(name, 0.0)):
            raise CalibrationError(f"the model was not calibrated: with {name} its distributions are no numbers")
    return calibration, Decision(calibration.id, moments.num_tokens, source, divergence, chosen, exact_keys)


class _Steps:
    """Counts what is done of a calibration."""

    def __init__(self, count: int, on_step: OnStep) -> None:
        self._count = count
        self._done = 0
        self._on_step = on_step
        self.done(0)

    def done(self, count: int = 1) -> None:
        """Note that so many more are done."""
        self._done += count
        self._on_step(self._done / self._count)


def _coarsest(
    judge: Judge, layout: BlockLayout, profile: Profile, calibration: Calibration, progress: _Steps
) -> tuple[Steps, float]:
    """The coarsest steps of those tried that stay within the profile's aim, else its usual ones; and the divergence."""
    usual, aim = STEPS[profile], KL_AIMS.get(profile)
    rungs = (*_COARSER, (0, 0)) if aim is not None else ((0, 0),)
    ladder = [Steps(usual.key_mult - key, usual.value_mult - value) for key, value in rungs]
    tried: dict[int, float] = {}
    first, last, rung = 0, len(ladder) - 1, 0  # the first mostly holds; else the divergence falls from rung to rung
    while last not in tried or first < last:
        tried[rung] = judge.divergence(Codec(layout, profile, calibration, ladder[rung]))
        progress.done()
        if aim is None or tried[rung] <= aim:
            last = rung
        else:
            first = min(rung + 1, last)
        rung = (first + last) // 2
    progress.done(_MOST_TRIED - len(tried))
    return ladder[last], tried[last]


def _starts(num_tokens: int, lengths: Sequence[int]) -> list[int]:
    """Where to cut pieces of these lengths, evenly spread and in the order of `_PLACES`."""
    spare = num_tokens - sum(lengths)
    if spare < 0:
        raise ConfigError(f"{num_tokens:,} tokens are too few to calibrate with; {sum(lengths):,} are needed")
    starts, taken = [0] * len(lengths), 0
    for place, piece in enumerate(_PLACES):
        starts[piece] = taken + spare * place // (len(lengths) - 1)
        taken += lengths[piece]
    return starts


def _fetch_tokens(store: Store, name: str, layout: BlockLayout, tokens: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[num_layers, kv_heads, len(tokens), dim]` of a stream."""
    entries = [
        entry
        for entry in store.manifest(name).entries
        if entry.first_token < tokens.stop and entry.first_token + entry.num_tokens > tokens.start
    ]
    slots = [torch.zeros(layout.slot_nbytes, dtype=torch.uint8) for _ in entries]
    report = store.fetch([FetchRequest(entry.key, slot) for entry, slot in zip(entries, slots, strict=True)])
    for entry, outcome in zip(entries, report.outcomes, strict=True):
        if not outcome.is_hit:
            raise CorruptRecordError(f"stream {name!r}: block {entry.index} cannot be read; see `kvstore verify`")
    first = tokens.start - entries[0].first_token
    keys, values = (
        torch.cat([part(slot)[:, :, : entry.num_tokens] for entry, slot in zip(entries, slots, strict=True)], dim=2)
        for part in (layout.keys, layout.values)
    )
    window = slice(first, first + len(tokens))
    return keys[:, :, window], values[:, :, window]
