# SPDX-License-Identifier: Apache-2.0
"""Asks a stream: finds the passages, brings back their blocks, and lets the model answer from them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType

import torch

from kvstore.engines.anatomy import position_rows, rotation_of, spec_of
from kvstore.engines.loading import LanguageModel
from kvstore.engines.transformers import TierCache, attach
from kvstore.layout import BlockLayout
from kvstore.retrieval.fusion import ExtraScores
from kvstore.retrieval.policy import Policy
from kvstore.retrieval.registry import policy_named
from kvstore.session.recall import Recall, Span, losses
from kvstore.session.session import Session
from kvstore.session.view import SessionConfig
from kvstore.store import Access, Store, check_spec
from kvstore.video.prompt import stamp
from kvstore.video.senses import prompts_of
from kvstore.watch.live import publish

MAX_NEW_TOKENS = 32
_FEW_TOKENS = 8
"""Blocks are rarely smaller; the device pool has slots for a budget of such ones."""
_SPARE_SLOTS = 32
"""Slots for the sinks."""


@dataclass(frozen=True, slots=True)
class Stages:
    """Seconds of a question until its first token, by stage; loading and decoding are in no other stage."""

    retrieve: float
    load: float
    decode: float
    attend: float


@dataclass(frozen=True, slots=True)
class _Moment:
    """A point in time, and the seconds of loading and decoding that a question has taken until then."""

    time_s: float
    load_s: float
    decode_s: float

    @staticmethod
    def of(recall: Recall) -> _Moment:
        return _Moment(time.perf_counter(), recall.load.load_s, recall.load.decode_s)

    def computed_s(self, since: _Moment) -> float:
        """Seconds since then that were neither loading nor decoding."""
        waited_s = self.load_s + self.decode_s - since.load_s - since.decode_s
        return self.time_s - since.time_s - waited_s


@dataclass(frozen=True, slots=True)
class Answer:
    """What was asked, what was answered, and from what.

    Args:
        question: as asked.
        answer: the model's words, up to the first line break.
        spans: cited stretches of the video, best first.
        ttft_s: seconds from the question to the first token of the answer.
        stages_s: the same by stage.
        bytes_read: bytes by tier, of the whole answer: device, host, disk.
        policy: what retrieved.
        tokens_in_stream: tokens of the stream.
        tokens_attended: tokens of the stream that the answer attended to.
        damaged: blocks that could not be searched or loaded: index, time span and reason.
        num_unsearched: how many could not be searched: whatever they hold, no question finds it.
    """

    question: str
    answer: str
    spans: list[Span]
    ttft_s: float
    stages_s: Stages
    bytes_read: dict[str, int]
    policy: str
    tokens_in_stream: int
    tokens_attended: int
    damaged: list[str]
    num_unsearched: int

    def to_json(self) -> dict[str, object]:
        """Plain values for `json.dumps`."""
        return asdict(self)


class Asker:
    """Answers questions about one stream; opens the store for reading, beside any writer.

    Args:
        store_folder: the store.
        name: the stream.
        language_model: the model that wrote the stream.
        policy: what to retrieve by: a policy, or its name.
        budget_tokens: most tokens of retrieved blocks.

    The index is read when the stream is opened: `index_s` are the seconds of it, paid once per process.

    Raises:
        StoreNotFoundError, StreamNotFoundError: nothing there by that name.
        SpecMismatchError: another model wrote the stream.
        ConfigError: no such policy.
    """

    def __init__(
        self,
        store_folder: Path,
        name: str,
        language_model: LanguageModel,
        *,
        policy: str | Policy = "auto",
        budget_tokens: int = 128,
        host_nbytes: int = 128 << 20,
    ) -> None:
        self._language_model = language_model
        self._prompts = prompts_of(language_model)
        model = language_model.model
        spec = spec_of(model)
        with Store.open(store_folder, access=Access.READ) as listing:
            manifest = listing.manifest(name)
        header = manifest.header
        check_spec(header, spec)
        layout = BlockLayout(header.spec, header.block_tokens)
        rule = policy if isinstance(policy, Policy) else policy_named(policy)
        # A recent block counts as a quarter of a full one at least; see `StreamView.first_block_within`.
        wanted = budget_tokens // _FEW_TOKENS + rule.recent_tokens // max(header.block_tokens // 4, 1)
        most_blocks = min(wanted, len(manifest.entries)) + _SPARE_SLOTS
        config = SessionConfig(
            policy=rule,
            sink_tokens=len(language_model.encode(self._prompts.preamble)),
            budget_tokens=budget_tokens,
            device_nbytes=most_blocks * layout.slot_nbytes,
        )
        self._store = Store.open(
            store_folder, access=Access.READ, layout=layout, profile=header.profile, host_nbytes=host_nbytes
        )
        self._publishing = ExitStack()
        self._publishing.enter_context(publish(self._store, store_folder, f"ask {name}"))
        try:
            self._session = Session(
                self._store, header, config, rotation_of(model), language_model.device, position_rows(model)
            )
            began = time.perf_counter()
            view = self._session.view
            if view.policy.retrieves:
                view.search(view.policy).refresh(view.num_sink_blocks, view.entries)
            self.index_s = time.perf_counter() - began
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Asker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the store."""
        self._publishing.close()
        self._store.close()

    def ask(self, question: str, max_new_tokens: int = MAX_NEW_TOKENS, external: Sequence[ExtraScores] = ()) -> Answer:
        """Answer one question.

        Args:
            question: in words.
            max_new_tokens: where to stop an answer that does not end by itself.
            external: what retrievers of your own think of the stream's blocks, one score for each: see
                `ExternalVectors`. They are fused by rank with the policy's own scores.

        Raises:
            ShapeError: not one external score for each block.
        """
        began = _Moment.of(Recall())
        view = self._session.view
        view.reload()
        with attach(self._language_model.model, self._session) as attached, torch.inference_mode():
            cache = attached.question(self._ids(question), external)
            recalled = _Moment.of(attached.last)
            tokens = self._tokens(cache, self._ids(self._prompts.question(question)), max_new_tokens)
            ids = list(islice(tokens, 1))
            first = _Moment.of(attached.last)
            ids += tokens
        recall, load = attached.last, attached.last.load
        return Answer(
            question=question,
            answer=self._words(ids),
            spans=[span for span in recall.spans if span.group >= 0],  # not the preamble: it is not in the video
            ttft_s=first.time_s - began.time_s,
            stages_s=Stages(
                retrieve=recalled.computed_s(began),
                load=first.load_s,
                decode=first.decode_s,
                attend=first.computed_s(recalled),
            ),
            bytes_read=dict(load.bytes_read),
            policy=view.policy.name,
            tokens_in_stream=view.num_tokens,
            tokens_attended=recall.num_attended_tokens,
            damaged=[
                f"block {entry.index}, {stamp(entry.start_s)}-{stamp(entry.end_s)}: {reason}"
                for entry, reason in losses(view.entries, view.damaged, load.lost)
            ],
            num_unsearched=len(view.damaged),
        )

    def _tokens(self, cache: TierCache, prompt: torch.Tensor, max_new_tokens: int) -> Iterator[int]:
        """Greedy decoding up to a line break, one token id at a time."""
        model, tokenizer = self._language_model.model, self._language_model.tokenizer
        ids: list[int] = []
        step = prompt
        for _ in range(max_new_tokens):
            logits = model(input_ids=step, past_key_values=cache, logits_to_keep=1).logits
            token = int(logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                return
            ids.append(token)
            yield token
            if "\n" in tokenizer.decode(token) and self._words(ids):
                return
            step = torch.tensor([[token]], device=prompt.device)

    def _ids(self, text: str) -> torch.Tensor:
        return torch.tensor([self._language_model.encode(text)], device=self._language_model.device)

    def _words(self, ids: list[int]) -> str:
        text: str = self._language_model.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip().split("\n")[0].strip()
