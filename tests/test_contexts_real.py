# SPDX-License-Identifier: Apache-2.0
"""Three notes that a real model has read apart, asked about together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import kvstore
from kvstore.video.model import load

SYSTEM = (
    "<|im_start|>system\nYou are a helpful assistant. Answer from the notes, in a few words.<|im_end|>\n"
    "<|im_start|>user\n"
)
NOTES = {
    "garden": "The apple tree by the wall was planted by Marta in 1987. It bears red fruit in September.",
    "boat": "The boat is called Heron and lies in the harbour of Kotka. Its engine was repaired by Timo.",
    "house": "The house has a green door. The key hangs behind the clock in the kitchen.",
}
QUESTIONS = {
    "Where does the key hang?": ("The key hangs behind the", "clock"),
    "Who planted the apple tree?": ("The apple tree was planted by", "Marta"),
    "Who repaired the engine?": ("The engine was repaired by", "Timo"),
    "What colour is the door?": ("The colour of the door is", "green"),
}


@pytest.mark.slow
@pytest.mark.parametrize("placed", ["parallel", "consecutive"])
def test_a_model_answers_from_notes_that_it_read_apart(placed: str, tmp_path: Path) -> None:
    language = load(None)
    model = language.model

    def ids(text: str) -> Tensor:
        return torch.tensor([language.encode(text)])

    with torch.no_grad(), kvstore.open(tmp_path, kvstore.spec_of(model), block_tokens=16) as store:
        system = store.stream("system")
        with kvstore.attach(model, system):
            model(ids(SYSTEM))
        for name, note in NOTES.items():
            with kvstore.attach(model, system.fork(name)):
                model(ids(f"Note on the {name}. {note}\n\n"))
    with (
        torch.no_grad(),
        kvstore.open(tmp_path, kvstore.spec_of(model), access=kvstore.Access.READ, block_tokens=16) as store,
        kvstore.attach(model, store.contexts(list(NOTES), policy="rekv", placed=placed)),
    ):
        for question, (begin, wanted) in QUESTIONS.items():
            prompt = ids(f"{question}<|im_end|>\n<|im_start|>assistant\n{begin}")
            made = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)  # type: ignore[operator]
            assert wanted in language.tokenizer.decode(made[0, prompt.shape[1] :]), question
