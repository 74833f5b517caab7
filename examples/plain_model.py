# SPDX-License-Identifier: Apache-2.0
"""The language model without a store: answers from a text that is wholly in its prompt."""

from __future__ import annotations

import time

import torch
from transformers import DynamicCache

from kvstore.engines.loading import LanguageModel
from kvstore.video.ask import MAX_NEW_TOKENS
from kvstore.video.prompt import PREAMBLE, question_prompt


class PlainModel:
    """Answers from a prompt, with the preamble and the question format that streams use too.

    Args:
        language_model: the model.
    """

    def __init__(self, language_model: LanguageModel) -> None:
        self._language_model = language_model

    def answer(self, passage: str, question: str) -> str:
        """Continue preamble, passage and question greedily, up to a line break.

        Args:
            passage: what the model may read; may be empty.
            question: in words.
        """
        tokenizer = self._language_model.tokenizer
        ids: list[int] = []
        cache, step = DynamicCache(), self._language_model.encode(PREAMBLE + passage + question_prompt(question))
        while len(ids) < MAX_NEW_TOKENS:
            token = self._next(step, cache)
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
            if "\n" in tokenizer.decode(token) and tokenizer.decode(ids).strip():
                break
            step = [token]
        words: str = tokenizer.decode(ids, skip_special_tokens=True)
        return words.strip().split("\n")[0].strip()

    def time_first_token(self, context: list[int], question: str) -> tuple[int, float]:
        """Read preamble, context and question.

        Args:
            context: token ids of what the model may read, without the preamble.
            question: in words.

        Returns:
            Tokens read, and seconds until the first token of an answer.
        """
        encode = self._language_model.encode
        began = time.perf_counter()
        ids = [*encode(PREAMBLE), *context, *encode(question_prompt(question))]
        self._next(ids, DynamicCache())
        return len(ids), time.perf_counter() - began

    @torch.inference_mode()
    def _next(self, ids: list[int], cache: DynamicCache) -> int:
        step = torch.tensor([ids], device=self._language_model.device)
        logits = self._language_model.model(input_ids=step, past_key_values=cache, logits_to_keep=1).logits
        return int(logits[0, -1].argmax())
