# SPDX-License-Identifier: Apache-2.0
"""Several streams attached to a running model: it can be asked, and takes in nothing."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.errors import ReadOnlyError
from kvstore.retrieval.fusion import ExtraScores
from kvstore.session.appender import Appender
from kvstore.session.attention_inputs import ContextRule
from kvstore.session.branch import Branch
from kvstore.session.contexts.view import ContextsView
from kvstore.session.reading.past import PastTokens
from kvstore.session.session import Session


class ContextsBranch(Branch):
    """One question over several contexts; their tokens have the policy's temperature and scale, the prefix has not."""

    def __init__(self, view: ContextsView, *, external: Sequence[ExtraScores] = ()) -> None:
        super().__init__(view, continues=False, external=external)
        self._num_prefix_tokens = view.num_prefix_tokens

    def _context_rule(self, past: PastTokens) -> ContextRule | None:
        temperature, scale = self._policy.context_temperature, self._policy.context_scale
        if temperature == 1 and scale == 1:
            return None
        numbers = past.numbers[0]  # the prefix, of which some may be lost, comes first in all lists
        first = int((numbers >= 0).logical_and(numbers < self._num_prefix_tokens).sum())
        return ContextRule(slice(first, numbers.shape[0]), temperature, scale)


class ContextsSession(Session):
    """A session over contexts, which are read together and never appended to.

    Args:
        view: the contexts.
    """

    # What a stream's session begins with, a window and an appender, is for those that grow.
    def __init__(self, view: ContextsView) -> None:
        self.view = view
        self.num_spare = 0

    def branch(
        self, *, continues: bool = False, external: Sequence[ExtraScores] = (), recent_tokens: int = 0
    ) -> Branch:
        """Start a question; see `Session.branch`.

        Raises:
            ReadOnlyError: it was to continue the contexts, or to read their end: they have none of their own.
        """
        if continues or recent_tokens:
            self._writer()
        assert isinstance(self.view, ContextsView), "made so"
        return ContextsBranch(self.view, external=external)

    def _writer(self) -> Appender:
        raise ReadOnlyError(
            f"contexts {self.view.header.name} are read together and take in nothing; ask them with generate() or "
            "question(), and append to their streams"
        )
