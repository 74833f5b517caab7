# SPDX-License-Identifier: Apache-2.0
"""What the adapter costs: prefill and decode through it, against the plain model with an equally long DynamicCache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from harness import MIN_ITERATIONS, WARM_UPS, Report, Timing, check, options
from kvstore.engines.anatomy import decoder_of
from kvstore.engines.loading import LanguageModel
from kvstore.engines.transformers import attach
from kvstore.retrieval.registry import policy_named
from kvstore.session.session import Session
from kvstore.video.model import load
from real_kv import add_options, scratch_session, text_ids

PROMPT_TOKENS = 16
CHUNK_TOKENS = 128


class Watch:
    """Wall and processor seconds of the calls under one name; all threads count."""

    def __init__(self) -> None:
        self.wall_s: list[float] = []
        self.cpu_s: list[float] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time what is inside."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall_s.append(time.perf_counter() - wall)
        self.cpu_s.append(time.process_time() - cpu)

    def after_warm_up(self, num_warm: int) -> tuple[Timing, Timing]:
        """(wall, processor) without the first calls."""
        return Timing.of(self.wall_s[num_warm:]), Timing.of(self.cpu_s[num_warm:])


def keep_window(cache: DynamicCache, window_tokens: int) -> None:
    """Cut a cache down to its last tokens."""
    if cache.get_seq_length() <= window_tokens:
        return
    layer: Any
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, -window_tokens:], layer.values[:, :, -window_tokens:]


def bench_prefill(report: Report, language_model: LanguageModel, session: Session, window: int, ids: list[int]) -> None:
    """Read the text chunk by chunk with both, in turns; the windows are equally long."""
    model = language_model.model
    decoder = decoder_of(model)
    plain_cache = DynamicCache()
    plain, tiered = Watch(), Watch()
    chunks = [ids[first : first + CHUNK_TOKENS] for first in range(0, len(ids), CHUNK_TOKENS)]
    for number, chunk in enumerate(chunks):
        tokens = torch.tensor([chunk], device=language_model.device)
        with plain.running():
            keep_window(plain_cache, window)
            wanted = decoder(input_ids=tokens, past_key_values=plain_cache, use_cache=True).last_hidden_state
        with attach(model, session) as attached, tiered.running():
            found = decoder(input_ids=tokens, past_key_values=attached.cache(), use_cache=True).last_hidden_state
            session.commit({"chunk": number})
        if (number + 1) * CHUNK_TOKENS <= window:  # as long as both see everything, they must agree
            check(close(found, wanted), f"chunk {number}: the adapter and the plain model disagree")
    session.view.store.flush()
    case = {"window": window, "chunk": CHUNK_TOKENS, "model": language_model.path.stem}
    num_warm = window // CHUNK_TOKENS + WARM_UPS
    report_both(report, "prefill", CHUNK_TOKENS, plain.after_warm_up(num_warm), tiered.after_warm_up(num_warm), case)


def bench_decode(report: Report, language_model: LanguageModel, session: Session, context: int, steps: int) -> None:
    """Generate token by token with both, in turns, at the same context length."""
    model = language_model.model
    ids = text_ids(language_model, context + PROMPT_TOKENS)
    prompt = torch.tensor([ids[-PROMPT_TOKENS:]], device=language_model.device)
    plain_cache = DynamicCache()
    decoder_of(model)(
        input_ids=torch.tensor([ids[:context]], device=language_model.device),
        past_key_values=plain_cache,
        use_cache=True,
    )
    model(input_ids=prompt, past_key_values=plain_cache, logits_to_keep=1)
    with attach(model, session) as attached:
        cache = attached.question()
        model(input_ids=prompt, past_key_values=cache, logits_to_keep=1)
    attended = attached.last.num_attended_tokens
    check(abs(attended - context) <= session.view.layout.block_tokens, f"{attended} tokens attended, not {context}")
    plain, tiered = Watch(), Watch()
    step = prompt[:, -1:]
    for _ in range(WARM_UPS + steps):
        with plain.running():
            model(input_ids=step, past_key_values=plain_cache, logits_to_keep=1)
        with attach(model, session), tiered.running():
            model(input_ids=step, past_key_values=cache, logits_to_keep=1)
    case = {"context": context, "attended": attended, "model": language_model.path.stem}
    report_both(report, "decode", 1, plain.after_warm_up(WARM_UPS), tiered.after_warm_up(WARM_UPS), case)


def report_both(
    report: Report,
    metric: str,
    num_tokens: int,
    plain: tuple[Timing, Timing],
    tiered: tuple[Timing, Timing],
    case: dict[str, Any],
) -> None:
    """Rows for wall and processor time."""
    for clock, unit, before, after in zip(("wall", "cpu"), ("tokens/s", "tokens/cpu-s"), plain, tiered, strict=True):
        report.rate(metric, num_tokens, unit, ("kvstore", after), ("DynamicCache", before), clock=clock, **case)


def close(found: Tensor, wanted: Tensor) -> bool:
    """Equal up to the rounding of the model's dtype."""
    tolerance = 8 * torch.finfo(wanted.dtype).eps
    return bool((found - wanted).float().norm() <= tolerance * wanted.float().norm())


def main() -> None:
    """Measure prefill over a window, then decode over as many tokens of the stream that this left."""
    settings = options("session", __doc__, add_options)
    report = Report(settings)
    language_model = load(settings.model)
    for context in [512] if settings.quick else [512, 2048]:
        ids = text_ids(language_model, (context // CHUNK_TOKENS + WARM_UPS + MIN_ITERATIONS) * CHUNK_TOKENS)
        policy = replace(policy_named("streaming_llm"), recent_tokens=context)
        with scratch_session(language_model, settings.folder, policy, context) as session, torch.inference_mode():
            bench_prefill(report, language_model, session, context, ids)
            bench_decode(report, language_model, session, context, 2 * MIN_ITERATIONS)
    report.write()


if __name__ == "__main__":
    main()
