# SPDX-License-Identifier: Apache-2.0
"""How well a model foresees what the user says: from the stream's window, from a fresh one, and with what came back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from harness import check
from kvstore.engines.anatomy import decoder_of
from kvstore.engines.attached import Attached
from kvstore.engines.next_token import PIECE_TOKENS, NextToken
from kvstore.engines.tier_cache import TierCache
from kvstore.engines.transformers import Model
from talk.turns import Turn

STEP_TOKENS = 128


class Listener:
    """Surprise of a model at the user's words, in nats per token. Not thread-safe.

    Args:
        model: before it is attached.
    """

    def __init__(self, model: Model) -> None:
        self._decoder: Any = decoder_of(model)
        self._next_token = NextToken(model)
        self._heard: Tensor | None = None

    @contextmanager
    def hearing(self) -> Iterator[None]:
        """Inside, what forwards that append a turn give is kept for `appended`."""

        def keep(module: object, args: object, kwargs: dict[str, Any], output: Any) -> None:
            cache, hidden = kwargs.get("past_key_values"), output.last_hidden_state
            check(bool(hidden.isfinite().all()), "the model says what is not a number")
            if isinstance(cache, TierCache) and cache.branch is None and self._heard is None:
                self._heard = hidden[0]

        handle = self._decoder.register_forward_hook(keep, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def appended(self, turn: Turn) -> Tensor:
        """[passage tokens] float32: surprise at a turn that was just appended, and forgets it."""
        heard, self._heard = self._heard, None
        assert heard is not None, "a turn was appended"
        return self._surprise(heard, turn)

    def fresh(self, before: Sequence[int], turn: Turn) -> Tensor:
        """The same, by the model itself over a text that it reads anew.

        Args:
            before: token ids of the sinks and of the window.
            turn: what follows them.
        """
        hidden = self._decoder(input_ids=self._filled([*before, *turn.ids[:-1]]), use_cache=False).last_hidden_state
        return self._surprise(hidden[0, len(before) :], turn)

    def looking_back(self, attached: Attached, turn: Turn) -> Tensor:
        """The same on a branch, with what the first half of the passage brings back."""
        half = (turn.text.start + turn.text.stop) // 2
        ids = self._filled(turn.ids[:-1])
        window = attached.session.view.config.window_tokens
        cache = attached.question(ids[:, :half], recent_tokens=window)
        hidden = self._decoder(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
        return self._surprise(hidden[0], turn)

    def _filled(self, ids: list[int]) -> Tensor:
        """Ids up to a length that comes again: kernels are kept for each."""
        return torch.tensor([[*ids, *ids[-1:] * (-len(ids) % STEP_TOKENS)]], device=self._decoder.device)

    def _surprise(self, hidden: Tensor, turn: Turn) -> Tensor:
        before = hidden[turn.text.start - 1 : turn.text.stop - 1]
        wanted = torch.tensor(turn.ids[turn.text], device=hidden.device)
        pieces = zip(before.split(PIECE_TOKENS), wanted.split(PIECE_TOKENS), strict=True)
        found = [-self._next_token.logs(rows).gather(1, ids[:, None])[:, 0].cpu() for rows, ids in pieces]
        return torch.cat(found)
