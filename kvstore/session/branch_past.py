# SPDX-License-Identifier: Apache-2.0
"""The past of a question: brings the tokens that it reads, places them, and replaces those that it reads no more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from kvstore.retrieval.estimates import Estimate
from kvstore.retrieval.policy import Policy
from kvstore.retrieval.positions import PositionPolicy
from kvstore.session.attending import Attending
from kvstore.session.attention_inputs import ContextRule
from kvstore.session.reading.past import PastTokens, Reading
from kvstore.session.recall import Recall
from kvstore.session.view import StreamView


class BranchPast(Attending):
    """Contexts over a stream as it was when the question began.

    Args:
        view: the stream.
        policy: where what is read is placed.
        continues: number the question's tokens on from the stream's end.
        recent_tokens: of the stream's end, that are read at least; the policy may have more.
    """

    def __init__(self, view: StreamView, policy: Policy, *, continues: bool, recent_tokens: int = 0) -> None:
        super().__init__(view.residency, view.rotate, policy.position, view.config.window_tokens, view.rows)
        self._view = view
        self._policy = policy
        self._entries = view.entries
        # Copies: the stream may go on, and its open slots with it, while the question is being answered.
        self._open_planes = [
            [(keys.clone(), values.clone()) for keys, values in view.open_planes(layer)]
            for layer in range(view.num_layers)
        ]
        self._open_positions = [rows.positions for rows in view.open_rows]
        self._end = view.end_position
        self._num_stored = self._entries.end_token
        self._tail_start = self._end if continues else 0
        self._recent_first = view.first_block_within(max(policy.recent_tokens, recent_tokens))
        self._sinks = tuple(self._entries[: min(view.num_sink_blocks, self._recent_first)])
        self._recent = self._entries[self._recent_first :]
        self._firsts = self._entries.first_tokens
        self._held: dict[int, Tensor] = {}
        """By layer, where rows may be in any order and nothing was lost: the token that each row of the past holds."""
        self.recall = Recall()

    def attend_to(
        self, attending: Attending, reading: Reading, layers: range, estimate: Estimate | None = None
    ) -> frozenset[int]:
        """Bring tokens and make them the past of some layers; returns the blocks that they are in."""
        is_answer = attending is self
        past = self._view.reader.read(
            reading,
            self._entries,
            self._firsts,
            self._view.positions_of,
            layers,
            self.recall.load,
            self._view.config.load_timeout_s,
        )
        placed = attending.place_past(
            past,
            self._open_positions if is_answer else [],
            num_stored=self._num_stored,
            end=self._end,
            tail_start=self._tail_start,
        )
        if is_answer:
            placed = replace(placed, context=self._context_rule(past))
        is_whole = past.numbers.shape[1] == reading.far[0].shape[0] + reading.near.shape[0]
        for layer in layers:
            if is_answer:
                self._held.pop(layer, None)
            attending.set_past(layer, past, self._open_planes[layer] if is_answer else [], placed, estimate)
            if is_answer and self._policy.position is PositionPolicy.ORIGINAL and estimate is None and is_whole:
                self._held[layer] = past.numbers
        if is_answer:
            self.recall.num_attended_tokens = max(self.recall.num_attended_tokens, placed.positions.shape[2])
        return past.blocks

    def attend_to_differences(self, readings: Mapping[int, Reading]) -> dict[int, frozenset[int]]:
        """Like `attend_to`, by replacing what layers do not read any more; see `DifferenceReader.read`.

        Returns:
            The blocks that the new tokens are in, by layer: of those that it could be done for.
        """
        view = self._view
        differences = view.differences.read(
            {layer: reading for layer, reading in readings.items() if layer in self._held},
            self._held,
            self._entries,
            self._firsts,
            view.positions_of,
            self.recall.load,
            view.config.load_timeout_s,
        )
        if differences is None:
            return {}
        for number, rows in enumerate(self.rotated_rows(differences)):
            layer = differences.layers[number]
            del self._held[layer]  # unknown, should this fail midway
            self.contexts[layer].replace(*rows)
            self._held[layer] = differences.numbers[number]
        return dict(zip(differences.layers, differences.blocks, strict=True))

    def _context_rule(self, past: PastTokens) -> ContextRule | None:
        """The rule for what was retrieved, if the policy has one: the rows between sinks and window."""
        temperature, scale = self._policy.context_temperature, self._policy.context_scale
        if temperature == 1 and scale == 1:
            return None
        num_sinks = sum(entry.num_tokens for entry in self._sinks)
        first = int((past.numbers[0] >= 0).logical_and(past.numbers[0] < num_sinks).sum())
        return ContextRule(slice(first, past.num_far), temperature, scale)
