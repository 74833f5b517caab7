# SPDX-License-Identifier: Apache-2.0
"""This project's codec over the corpus: real records of 128 tokens, calibrated on the other documents."""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file
from torch import Tensor

from kvstore import bases
from kvstore.bases import BasisSums
from kvstore.calibration import MIN_TOKENS, SINK_TOKENS, Calibration, calibrate
from kvstore.codec import Codec, Profile, Steps, probe
from kvstore.decision import Decision
from kvstore.engines import calibrating, judging, past, sensitivity
from kvstore.engines.anatomy import spec_of
from kvstore.engines.calibrating import calibrate_model, runs_of_text
from kvstore.engines.past import Run
from kvstore.engines.sensitivity import log_steps
from kvstore.layout import BlockLayout
from kvstore.moments import Moments
from quality.corpus import Corpus, keep
from quality.rivals import BLOCK_TOKENS
from quality.scheme import Coded, Scheme
from quality.texts import PROMPT_TOKENS

_CALIBRATION_TOKENS = 256
"""Of each continuation, to see how much the model minds errors."""
_SEED = 0


def profile_scheme(profile: Profile, *, with_model: bool = True) -> Scheme:
    """Records of one profile.

    Args:
        profile: of the codec.
        with_model: calibrate as `kvstore calibrate` does, by how the model minds errors; else as a store does by
            itself, by the moments of K and V alone.
    """
    name = str(profile) if with_model else f"{profile}, calibrated without the model"
    return Scheme(name, partial(_coded, profile, with_model), is_exact=not profile.is_lossy)


def layout_of(corpus: Corpus) -> BlockLayout:
    """Slots of 128 tokens in bfloat16, as the corpus is kept."""
    return BlockLayout(replace(spec_of(corpus.language_model.model), dtype="bfloat16"), BLOCK_TOKENS)


def slots_of(corpus: Corpus, document: int, layout: BlockLayout) -> list[Tensor]:
    """A document's blocks."""
    slots = []
    for first in range(0, PROMPT_TOKENS, BLOCK_TOKENS):
        slot = torch.zeros(layout.slot_nbytes, dtype=torch.uint8)
        layout.keys(slot)[:] = corpus.keys[document, :, :, first : first + BLOCK_TOKENS]
        layout.values(slot)[:] = corpus.values[document, :, :, first : first + BLOCK_TOKENS]
        slots.append(slot)
    return slots


def codec_without(corpus: Corpus, document: int, profile: Profile, *, with_model: bool = True) -> Codec:
    """A codec that has not seen the document."""
    layout = layout_of(corpus)
    if not profile.is_lossy:
        return Codec(layout, profile)
    if not with_model:
        return Codec(layout, profile, _measured_without(corpus, document))
    calibration, decision = _calibrated_without(corpus, document)
    steps = Steps(*decision.steps[profile]) if profile in decision.steps else None
    return Codec(layout, profile, calibration, steps, exact_keys=profile in decision.exact_keys)


def _measured_without(corpus: Corpus, document: int) -> Calibration:
    """The moments of the other documents."""
    _, layers, heads, _, dim = corpus.keys.shape
    sums, products = Moments(layers, heads, dim, dim), BasisSums(layers, heads, dim, dim, MIN_TOKENS)
    for other in corpus.without(document):
        for each in (sums, products):
            each.add(corpus.keys[other][:, :, SINK_TOKENS:], corpus.values[other][:, :, SINK_TOKENS:])
    return calibrate(sums, bases=products)


def _calibrated_without(corpus: Corpus, document: int) -> tuple[Calibration, Decision]:
    """What calibrating with the other documents gives; kept in the user's cache."""
    path = _derived(corpus, document, (bases, calibrating, judging, past, sensitivity), "kvcl")
    if not path.with_suffix(".json").is_file():
        ids = [token for other in corpus.without(document) for token in corpus.documents[other].ids]
        runs = runs_of_text(corpus.language_model, ids)
        calibration, decision = calibrate_model(
            corpus.language_model, runs, layout_of(corpus), "the other documents", with_bases=True
        )
        path.write_bytes(calibration.data)
        path.with_suffix(".json").write_bytes(decision.to_json())
    return Calibration(path.read_bytes()), Decision.from_json(path.with_suffix(".json").read_bytes())


def _derived(corpus: Corpus, document: int, made_by: tuple[ModuleType, ...], suffix: str) -> Path:
    """Where the cache keeps what modules of this text make of the documents but one."""
    sources = [inspect.getsource(module) for module in made_by]
    name = hashlib.sha256(repr((_CALIBRATION_TOKENS, document, sources)).encode()).hexdigest()[:16]
    return corpus.path.with_name(f"{corpus.path.stem}-{name}.{suffix}")


def log_steps_without(corpus: Corpus, document: int) -> tuple[Tensor, Tensor]:
    """`kvstore.engines.sensitivity.log_steps` by the other documents; kept in the user's cache."""
    path = _derived(corpus, document, (past, sensitivity), "safetensors")
    if not path.is_file():
        runs = []
        for other in corpus.without(document):
            ids = corpus.documents[other].ids[PROMPT_TOKENS:][:_CALIBRATION_TOKENS]
            runs.append(Run(corpus.keys[other].float(), corpus.values[other].float(), torch.tensor([ids]), 0))
        keys, values = log_steps(corpus.language_model.model, runs, torch.Generator().manual_seed(_SEED))
        keep(path, {"keys": keys, "values": values})
    found = load_file(path)
    return found["keys"], found["values"]


def _coded(profile: Profile, with_model: bool, corpus: Corpus, document: int) -> Coded:
    """Encode and decode; what surrounds the planes of a record counts half for K."""
    layout = layout_of(corpus)
    codec = codec_without(corpus, document, profile, with_model=with_model)
    out = memoryview(bytearray(codec.bound(BLOCK_TOKENS)))
    restored, stored = [], [0.0, 0.0]
    for number, slot in enumerate(slots_of(corpus, document, layout)):
        record = out[: codec.encode(slot, BLOCK_TOKENS, number * BLOCK_TOKENS, out)]
        restored.append(torch.zeros_like(slot))
        codec.decode(record, restored[-1], num_tokens=BLOCK_TOKENS)
        planes = [[plane.nbytes for plane in probe(record).planes[side::2]] for side in (0, 1)]
        around = len(record) - sum(map(sum, planes))
        for side in (0, 1):
            stored[side] += sum(planes[side]) + around / 2
    keys, values = (
        torch.cat([view(slot) for slot in restored], dim=2).float() for view in (layout.keys, layout.values)
    )
    return Coded(keys, values, stored[0] * 8, stored[1] * 8)
