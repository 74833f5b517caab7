# SPDX-License-Identifier: Apache-2.0
"""One phase in a process of its own: append up to a length, or ask. Prints what it found as JSON, in its last line.

python -m long_streams.phases append FOLDER NUM_TOKENS
python -m long_streams.phases ask FOLDER POLICY NUM_QUESTIONS
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import kvstore
from kvstore.config import Access, Durability
from kvstore.session.session import Session
from kvstore.session.stream import Stream
from long_streams.made import BLOCK_TOKENS, CHUNK_TOKENS, RUN_TOKENS, SPACING_TOKENS, SPEC, Chunk, MadeStream, rotate
from long_streams.memory import resident_nbytes

NAME = "long"
HOST_NBYTES = 128 << 20
DEVICE_NBYTES = 32 << 20
WINDOW_TOKENS = 512
TRAINED_TOKENS = 8192
SCALE = SPEC.key_dim**-0.5
DECODED_TOKENS = 8
"""After the question, one by one."""


def append(folder: Path, num_tokens: int) -> dict[str, Any]:
    """Go on with the stream, or begin it, until it has `num_tokens` tokens."""
    made = MadeStream()
    began, cpu = time.perf_counter(), time.process_time()
    with kvstore.open(
        folder, SPEC, block_tokens=BLOCK_TOKENS, host_nbytes=HOST_NBYTES, durability=Durability.NONE
    ) as store:
        stream = store.stream(NAME, window_tokens=WINDOW_TOKENS, device_nbytes=DEVICE_NBYTES)
        session = stream.bind(rotate, torch.device("cpu"))
        opened = time.perf_counter()
        first = session.num_tokens
        for start in range(first, num_tokens, CHUNK_TOKENS):
            for block in range(start // BLOCK_TOKENS, (start + CHUNK_TOKENS) // BLOCK_TOKENS):
                session.segment(BLOCK_TOKENS, float(block), block + 1.0, block)
            append_chunk(session, made.chunk(start))
        stream.commit()
        num_tokens = session.num_tokens
    found: dict[str, Any] = {"num_tokens": num_tokens, "appended": num_tokens - first}
    found["open_s"] = opened - began
    found["append_s"] = time.perf_counter() - opened
    found["cpu_s"] = time.process_time() - cpu
    return {**found, **resident_nbytes()}


def ask(folder: Path, policy: str, num_questions: int) -> dict[str, Any]:
    """Open the store for reading and ask for planted runs all over the stream."""
    made = MadeStream()
    with kvstore.open(folder, SPEC, access=Access.READ, block_tokens=BLOCK_TOKENS, host_nbytes=HOST_NBYTES) as store:
        began = time.perf_counter()
        stream = store.stream(NAME, policy=policy, window_tokens=WINDOW_TOKENS, device_nbytes=DEVICE_NBYTES)
        session = stream.bind(rotate, torch.device("cpu"), trained_tokens=TRAINED_TOKENS)
        open_s = time.perf_counter() - began
        num_needles = session.num_tokens // SPACING_TOKENS
        count = min(num_questions, num_needles)
        answers = [Answer(stream, made, number * num_needles // count) for number in range(count)]
        found: dict[str, Any] = {"num_tokens": session.num_tokens, "policy": session.view.policy.name}
    found["open_s"] = open_s
    found["first_s"] = answers[0].recall_s
    found["recall"] = sum(answer.is_found for answer in answers) / count
    for name in ("recall_s", "choose_s", "prefill_s", "decode_s", "cpu_s"):
        found[name] = [getattr(answer, name) for answer in answers]
    return {**found, **resident_nbytes()}


class Answer:
    """One question, asked and answered."""

    def __init__(self, stream: Stream, made: MadeStream, number: int) -> None:
        question, wanted = made.question(number), made.needle(number).first_token
        cpu, began = time.process_time(), time.perf_counter()
        with stream.recalling():
            forward(stream, question)
            scouted = time.perf_counter()
        recalled = time.perf_counter()
        with stream.asking():
            forward(stream, question)
            answered = time.perf_counter()
            for step in range(DECODED_TOKENS):
                forward(stream, _token(question, step))
        decoded = time.perf_counter()
        self.cpu_s = time.process_time() - cpu
        self.recall_s, self.choose_s = recalled - began, recalled - scouted
        self.prefill_s, self.decode_s = answered - recalled, (decoded - answered) / DECODED_TOKENS
        spans = [span for span in stream.last.spans if span.is_attended]
        self.is_found = any(span.first_token <= wanted < span.first_token + BLOCK_TOKENS for span in spans)


def append_chunk(session: Session, chunk: Chunk) -> None:
    """One forward that appends, but for attention itself, whose result nobody looks at."""
    for layer in range(SPEC.num_layers):
        planes = chunk.queries[layer], chunk.keys[layer], chunk.values[layer]
        session.extend(layer, *planes, chunk.positions, chunk.ids, SCALE)


def forward(stream: Stream, chunk: Chunk) -> None:
    """One forward of a model that is nothing but attention."""
    for layer in range(SPEC.num_layers):
        planes = chunk.queries[layer], chunk.keys[layer], chunk.values[layer]
        stream.attend(layer, *planes, chunk.positions, ids=chunk.ids, scale=SCALE)


def _token(question: Chunk, step: int) -> Chunk:
    row = slice(step, step + 1)
    positions = torch.full((1, 1, 1), 2 * RUN_TOKENS + step)
    parts = (each[:, :, :, row] for each in (question.queries, question.keys, question.values))
    return Chunk(question.ids[row], positions, *parts)


def main() -> None:
    """Run the phase that the arguments name."""
    torch.set_num_threads(1)
    kind, folder, *rest = sys.argv[1:]
    is_append = kind == "append"
    found = append(Path(folder), int(rest[0])) if is_append else ask(Path(folder), rest[0], int(rest[1]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
