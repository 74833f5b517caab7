# SPDX-License-Identifier: Apache-2.0
"""An endless chat: hours of simulated turns and replies in one stream; memory, disk, and what the model makes of it.

Ends with an error, behind the rows, where memory grows, replies are no text, or a fresh window foresees more."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import kvstore
from harness import Report, check, options
from kvstore.cli.heap import release_free_memory
from kvstore.engines.anatomy import spec_of
from kvstore.engines.attached import Attached
from kvstore.engines.loading import LanguageModel
from kvstore.retrieval.registry import policies
from kvstore.video.model import load
from machine import ROOT
from talk.listening import Listener
from talk.quarter import QUARTER_S, TOKENS_PER_S, Quarter, memory_mib, slope
from talk.turns import Turn, turns
from talk.verdict import SETTLED, faults

sys.path.append(str(ROOT / "examples"))
from demo_scoring import is_hit

HOURS, QUICK_HOURS = 3.0, 1 / 6
REPLY_TOKENS = 24
SAMPLE_EVERY = 4
HOST_NBYTES = 64 << 20


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="model folder or GGUF file; the default is SmolLM2-135M-Instruct")
    parser.add_argument("--hours", type=float, help=f"of simulated time (default {HOURS:g})")
    parser.add_argument("--policies", nargs="+", choices=sorted(policies()), default=["auto", "streaming_llm"])
    parser.add_argument("--folder", type=Path, help="where the scratch store is written; default: the system's")


def talk(language_model: LanguageModel, store: kvstore.KVStore, policy: str, num_tokens: int) -> list[Quarter]:
    """Hold one chat of about so many tokens."""
    chat = Chat(language_model, store, policy)
    said = turns(language_model.encode)
    with kvstore.attach(language_model.model, chat.stream) as attached, chat.listener.hearing(), torch.no_grad():
        for number, turn in enumerate(said):
            chat.take(attached, turn, is_sampled=number % SAMPLE_EVERY == SAMPLE_EVERY - 1)
            if chat.num_tokens >= num_tokens:
                break
        else:
            check(False, f"the texts end after {chat.num_tokens} tokens, and {num_tokens} were to be said")
    return chat.quarters


class Chat:
    """A chat under way.

    Args:
        language_model: replies.
        store: an empty one.
        policy: what replies retrieve by.
    """

    def __init__(self, language_model: LanguageModel, store: kvstore.KVStore, policy: str) -> None:
        self._language_model = language_model
        self._store = store
        self.stream = store.stream("chat", policy=policy)
        self.listener = Listener(language_model.model)
        self.quarters: list[Quarter] = []
        self.num_tokens = 0
        self._sinks: list[int] = []
        self._latest: list[int] = []

    def take(self, attached: Attached, turn: Turn, *, is_sampled: bool) -> None:
        """One turn and its reply."""
        has_text = turn.text.stop > turn.text.start
        is_sampled = is_sampled and has_text and self.num_tokens > 0
        alternatives = []
        if is_sampled:
            alternatives = [self._fresh(attached, turn), self.listener.looking_back(attached, turn)]
        reply = attached.reply(
            torch.tensor([turn.ids], device=self._language_model.device),
            max_new_tokens=REPLY_TOKENS,
            do_sample=True,
            temperature=0.7,
            top_k=50,
        )[0].tolist()
        surprise = self.listener.appended(turn)
        self._keep(attached, [*turn.ids, *reply])
        self.num_tokens += len(turn.ids) + len(reply)
        check(attached.session.num_tokens == self.num_tokens, "the stream does not hold what was said")
        self._note(turn, surprise, alternatives, reply)

    def _note(self, turn: Turn, surprise: torch.Tensor, alternatives: Sequence[torch.Tensor], reply: list[int]) -> None:
        time_s = self.num_tokens / TOKENS_PER_S
        while len(self.quarters) * QUARTER_S < time_s:
            print(f"# {time_s / 60:.0f} minutes, {memory_mib():.0f} MiB", flush=True)
            self.quarters.append(Quarter())
        quarter = self.quarters[-1]
        words = self._language_model.tokenizer.decode(reply, skip_special_tokens=True).strip()
        check(bool(words), f"an empty reply after {self.num_tokens} tokens")
        quarter.replies.append(words)
        if turn.accept:
            quarter.remembered.append(is_hit(words, turn.accept))
        if surprise.shape[0]:
            quarter.said.append(float(surprise.mean()))
        if alternatives:
            fresh, back = alternatives
            half = surprise.shape[0] // 2
            quarter.halves.append(
                (float(fresh[half:].mean()), float(surprise[half:].mean()), float(back[half:].mean()))
            )
        usage = self._store.blocks.stats().usage
        quarter.times_s.append(time_s)
        release_free_memory()  # as `kvstore ingest` does: what glibc keeps for later is no memory of the chat
        quarter.memory_mib.append(memory_mib())
        quarter.disk_mib.append((usage.extent_used_nbytes + usage.catalogue_nbytes) / 2**20)

    def _fresh(self, attached: Attached, turn: Turn) -> torch.Tensor:
        """Surprise at a turn behind the sinks and exactly the window that the stream shows, read anew."""
        view = attached.session.view
        first = view.first_block_within(view.config.window_tokens)
        in_window = view.num_tokens - (view.entries[first].first_token if first < len(view.entries) else 0)
        num_sinks = 0
        if first >= view.num_sink_blocks and view.num_sink_blocks:
            last = view.entries[view.num_sink_blocks - 1]
            num_sinks = last.first_token + last.num_tokens
        return self.listener.fresh([*self._sinks[:num_sinks], *self._latest[-in_window:]], turn)

    def _keep(self, attached: Attached, ids: Sequence[int]) -> None:
        """Remember as much as a fresh window needs, and no more."""
        view = attached.session.view
        block, window = view.layout.block_tokens, view.config.window_tokens
        self._sinks = [*self._sinks, *ids][:block]
        self._latest = [*self._latest, *ids][-(window + 2 * block) :]


def report_quarters(report: Report, policy: str, quarters: Sequence[Quarter], token_nbytes: int) -> None:
    """One row per figure and quarter, and the growth of memory and disk behind the first ones."""
    first = quarters[0]
    for number, quarter in enumerate(quarters):
        case = {"policy": policy, "quarter": number + 1}
        memory, start = (max(each.memory_mib) for each in (quarter, first))
        report.value("memory", "MiB", (policy, memory), ("first quarter", start), **case)
        report.value("disk", "MiB", (policy, quarter.disk_mib[-1]), ("first quarter", first.disk_mib[-1]), **case)
        report.value("perplexity", "", (policy, quarter.perplexity), ("first quarter", first.perplexity), **case)
        if quarter.halves:
            fresh, window, back = (quarter.half_perplexity(which) for which in range(3))
            report.value("second halves", "perplexity", ("sinks and window", window), ("fresh window", fresh), **case)
            report.value("second halves", "perplexity", (f"with {policy}", back), ("fresh window", fresh), **case)
        report.value("distinct words", "share", (policy, quarter.distinct), ("first quarter", first.distinct), **case)
        report.value("printable", "share", (policy, quarter.printable), ("all signs", 1.0), **case)
        if quarter.remembered:
            right = sum(quarter.remembered) / len(quarter.remembered)
            report.value(
                "remembered", "share", (policy, right), ("all notes", 1.0), notes=len(quarter.remembered), **case
            )
    settled = quarters[SETTLED:] or quarters
    times = list(itertools.chain.from_iterable(quarter.times_s for quarter in settled))
    said = ("KV of what is said", 3600 * TOKENS_PER_S * token_nbytes / 2**20)
    for metric, values in (
        ("growth of memory", [each.memory_mib for each in settled]),
        ("growth of disk", [each.disk_mib for each in settled]),
    ):
        grown = slope(times, list(itertools.chain.from_iterable(values)))
        report.value(metric, "MiB/h", (policy, grown), said, policy=policy, settled=SETTLED)


def table(found: dict[str, list[Quarter]]) -> str:
    """Quarters of all policies, one line each."""
    lines = ["policy         quarter  memory MiB  disk MiB  perplexity  fresh  window  back  distinct  remembered"]
    for policy, quarters in found.items():
        for number, one in enumerate(quarters):
            halves = [f"{one.half_perplexity(which):.2f}" for which in range(3)] if one.halves else ["", "", ""]
            sizes = f"{max(one.memory_mib):10.0f}  {one.disk_mib[-1]:8.0f}"
            said = f"{one.perplexity:10.2f}  {halves[0]:>5}  {halves[1]:>6}  {halves[2]:>4}"
            right = f"{sum(one.remembered)}/{len(one.remembered)}"
            lines.append(f"{policy:14} {number + 1:7}  {sizes}  {said}  {one.distinct:8.2f}  {right:>10}")
    return "\n".join(lines)


def main() -> None:
    """Hold one chat per policy, each in a scratch store of its own."""
    settings = options("chat", __doc__, add_options)
    hours = settings.hours or (QUICK_HOURS if settings.quick else HOURS)
    num_tokens = int(hours * 3600 * TOKENS_PER_S)
    language_model = load(settings.model)
    spec = spec_of(language_model.model)
    report = Report(settings, {"model": language_model.path.stem, "tokens": num_tokens})
    found: dict[str, list[Quarter]] = {}
    for policy in settings.policies:
        torch.manual_seed(0)
        with (
            TemporaryDirectory(dir=settings.folder) as scratch,
            kvstore.open(Path(scratch) / "store", spec, host_nbytes=HOST_NBYTES) as store,
        ):
            found[policy] = talk(language_model, store, policy, num_tokens)
        report_quarters(report, policy, found[policy], spec.token_nbytes)
        report.write()  # what is there, should the next one be stopped
    print(table(found))
    wrong = [f"{policy}, {fault}" for policy, quarters in found.items() for fault in faults(quarters)]
    check(not wrong, "; ".join(wrong))


if __name__ == "__main__":
    main()
