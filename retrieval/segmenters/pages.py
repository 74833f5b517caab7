# SPDX-License-Identifier: Apache-2.0
"""Pages: runs of equally many tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.errors import ConfigError
from kvstore.retrieval.tokens import LayerTokens
from kvstore.retrieval.units import Units


@dataclass(frozen=True, slots=True)
class Pages:
    """Cuts every `num_tokens` tokens, in order of arrival; the last page may be shorter at the end.

    Raises:
        ConfigError: `num_tokens` is not positive.
    """

    num_tokens: int

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ConfigError(f"pages of {self.num_tokens} tokens; they must hold at least one")

    def cut(self, tokens: LayerTokens, *, is_end: bool) -> Sequence[Units]:
        """See `Segmenter`."""
        whole, rest = divmod(tokens.num_tokens, self.num_tokens)
        return [Units.runs(tokens.first, [self.num_tokens] * whole + [rest] * (is_end and rest > 0))]
