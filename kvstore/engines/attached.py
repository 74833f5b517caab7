# SPDX-License-Identifier: Apache-2.0
"""A model with a stream attached, as users see it: caches that append, questions, and turns of a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvstore.engines.anatomy import decoder_of, linear_layers
from kvstore.engines.linear_layers import LinearStates
from kvstore.engines.tier_cache import TierCache
from kvstore.errors import ShapeError
from kvstore.retrieval.fusion import ExtraScores
from kvstore.session.recall import Recall
from kvstore.session.session import Session

if TYPE_CHECKING:
    from kvstore.engines.model import Model


_SHORT_TOKENS = 128
_SHORT_STEP, _STEP = 16, 64


class Attached:
    """A model with a stream attached: what the `with` statement of `attach` hands out.

    Inside it, a forward without a cache appends to the stream; `generate()` asks on a fresh branch. A cache that the
    caller brings along, and `use_cache=False`, are left alone.
    """

    def __init__(self, model: Model, session: Session) -> None:
        self.model = model
        self.session = session
        self.last = Recall()
        self._states: LinearStates | None = None
        if linear_layers(model):
            self._states = LinearStates(model)
            self._states.restore(session)

    def cache(self) -> TierCache:
        """A cache that appends to the stream: its length is the stream's."""
        return TierCache(self.session, None, self._states)

    def save_state(self) -> None:
        """Store the states of a hybrid model's linear layers, so that another process can go on from here.

        Closes the last block although it has room; does nothing for other models, which need no more than the blocks.

        Raises:
            ConfigError: a forward failed midway since they were last restored.
            CapacityError, StoreIOError: see `Session.commit`.
        """
        if self._states is not None:
            self.session.save_state(self._states.pack(self.session.num_tokens))

    def question(
        self, input_ids: Tensor | None = None, external: Sequence[ExtraScores] = (), *, recent_tokens: int = 0
    ) -> TierCache:
        """A cache for one question and its answer; neither is stored.

        Args:
            input_ids: [1, num_tokens] int64: the bare question, to retrieve by. Without it, the prompt's first forward
                retrieves by the whole prompt.
            external: what retrievers of your own think of the stream's blocks, one score for each: see
                `ExternalVectors`. They are fused by rank with the policy's own scores.
            recent_tokens: of the stream's end, that are attended to whatever is found; a policy may have more.

        Raises:
            ShapeError: the question is empty, or more than one; not one external score for each block.
            ConfigError: `recent_tokens` is negative.
        """
        if input_ids is not None:
            _check(input_ids, "question")
        branch = self.session.branch(external=external, recent_tokens=recent_tokens)
        self.last = branch.recall
        cache = TierCache(self.session, branch, self._states)
        if input_ids is not None and branch.selects_next:
            filled, branch.num_spare = self._filled(input_ids)
            with cache.recalling(), torch.no_grad():
                decoder_of(self.model)(input_ids=filled, past_key_values=cache, use_cache=True)
            self.last = branch.recall
        return cache

    def reply(self, input_ids: Tensor, external: Sequence[ExtraScores] = (), **generation: Any) -> Tensor:
        """One turn of a conversation: append it, generate the reply, append that.

        The reply reads the stream's sinks, what the policy brings back for the turn, and the end of the stream, as much
        as a forward that appends sees of it. What is stored of turn and reply is computed from sinks and window alone,
        so it does not depend on what was brought back. If generating fails, the turn is stored without its last token.

        Args:
            input_ids: [1, num_tokens] int64: the turn, and whatever opens the reply in the model's chat format.
            external: what retrievers of your own think of the stream's blocks; see `question`.
            generation: handed to `model.generate()`: one reply, `max_new_tokens=` and so on.

        Returns:
            [1, num_new] int64: the reply, with the token that ended it if there is one.

        Raises:
            ShapeError: the turn is empty, or more than one; more than one reply; not one external score for each block.
            ReadOnlyError, CapacityError, StoreIOError: it cannot be stored.
        """
        _check(input_ids, "turn")
        model: Any = self.model
        with torch.no_grad():
            if input_ids.shape[1] > 1:
                self._append(input_ids[:, :-1])
            cache = self.question(input_ids, external, recent_tokens=self.session.view.config.window_tokens)
            said: Tensor = model.generate(input_ids[:, -1:], past_key_values=cache, **generation)
            _check(said, "reply")
            self._append(said)
        return said[:, 1:]

    def _append(self, input_ids: Tensor) -> None:
        filled, self.session.num_spare = self._filled(input_ids)
        try:
            decoder_of(self.model)(input_ids=filled, past_key_values=self.cache(), use_cache=True)
        finally:
            self.session.num_spare = 0

    def _filled(self, input_ids: Tensor) -> tuple[Tensor, int]:
        """Fill tokens up to one of few lengths, and say by how many.

        oneDNN compiles and keeps kernels for every length that it meets, 2 MB each for a model of 135 million
        parameters: a process that takes turns of all lengths grew by hundreds of megabytes. No token attends to those
        behind it; but what a linear layer has read, it cannot forget.
        """
        num_tokens = input_ids.shape[1]
        spare = -num_tokens % (_SHORT_STEP if num_tokens <= _SHORT_TOKENS else _STEP)
        if self._states is not None or not spare:
            return input_ids, 0
        return torch.cat([input_ids, input_ids[:, -1:].expand(-1, spare)], dim=1), spare


def _check(input_ids: Tensor, what: str) -> None:
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        raise ShapeError(f"a {what} is [1, num_tokens] with at least one token; got {list(input_ids.shape)}")
