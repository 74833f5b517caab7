# SPDX-License-Identifier: Apache-2.0
"""What a model makes of lossy keys and values: KL, agreement and perplexity over a continuation, and planted notes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from kvstore.engines.past import continue_run
from quality.corpus import Corpus
from quality.texts import PROMPT_TOKENS


@dataclass(frozen=True, slots=True)
class Verdict:
    """The quality of one scheme on one document.

    Args:
        kl: [positions] KL divergence of the next token's distribution, exact || lossy, nats.
        agrees: [positions] whether the most likely token is the same.
        added_loss: mean negative log-likelihood of the continuation, less that with exact keys and values, nats.
        found: [needles] whether greedy decoding completes a planted note word for word.
    """

    kl: Tensor
    agrees: Tensor
    added_loss: float
    found: Tensor


@dataclass(frozen=True, slots=True)
class Summary:
    """The quality of one scheme.

    Args:
        kl: mean over all positions, nats.
        top1: share of positions that agree.
        perplexity: relative change.
        needles: share of notes completed.
    """

    kl: float
    top1: float
    perplexity: float
    needles: float


def divergence(exact: Tensor, lossy: Tensor) -> Tensor:
    """KL divergence of [..., vocabulary] log-probabilities, nats: what is lost by believing `lossy`."""
    return (exact.exp() * (exact - lossy)).sum(-1)


def summed_up(verdicts: Sequence[Verdict]) -> Summary:
    """Means over documents; the perplexity is that of all continuations together."""
    return Summary(
        float(torch.cat([verdict.kl for verdict in verdicts]).mean()),
        float(torch.cat([verdict.agrees for verdict in verdicts]).float().mean()),
        math.expm1(sum(verdict.added_loss for verdict in verdicts) / len(verdicts)),
        float(torch.cat([verdict.found for verdict in verdicts]).float().mean()),
    )


class Judge:
    """Runs continuations on given keys and values, and compares them with those on the exact ones.

    A continuation is the rest of the text, then every note of the prompt again.

    Args:
        corpus: the exact keys and values.
        num_documents: only the first ones are judged.
        positions: tokens of the text in each continuation.
    """

    def __init__(self, corpus: Corpus, num_documents: int, positions: int) -> None:
        self._corpus = corpus
        self._positions = positions
        self._exact = [
            self._logs(document, corpus.keys[document].float(), corpus.values[document].float())
            for document in range(num_documents)
        ]

    def judge(self, document: int, keys: Tensor, values: Tensor) -> Verdict:
        """Judge [layers, heads, PROMPT_TOKENS, dim] float32, keys before RoPE."""
        return self._compare(document, self._logs(document, keys, values))

    def judge_exact(self, document: int) -> Verdict:
        """What `judge` says of the exact keys and values."""
        return self._compare(document, self._exact[document])

    def _compare(self, document: int, logs: Tensor) -> Verdict:
        text = self._corpus.documents[document]
        exact, lossy = self._exact[document][: self._positions], logs[: self._positions]
        targets = torch.tensor(text.ids[PROMPT_TOKENS + 1 :][: self._positions])
        found = []
        said = logs.argmax(-1).tolist()
        first = self._positions
        for needle in text.needles:
            answered = said[first - 1 : first - 1 + len(needle.ids)]
            found.append(answered[needle.answer] == needle.ids[needle.answer])
            first += len(needle.ids)
        return Verdict(
            divergence(exact, lossy),
            exact.argmax(-1) == lossy.argmax(-1),
            float(nll_loss(lossy, targets) - nll_loss(exact, targets)),
            torch.tensor(found),
        )

    def _logs(self, document: int, keys: Tensor, values: Tensor) -> Tensor:
        text = self._corpus.documents[document]
        ids = text.ids[PROMPT_TOKENS:][: self._positions] + [token for needle in text.needles for token in needle.ids]
        with torch.inference_mode():
            return continue_run(self._corpus.language_model.model, keys, values, torch.tensor([ids]))
