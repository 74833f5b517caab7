# SPDX-License-Identifier: Apache-2.0
"""Runs of the kvstore command for tests: a tiny random model, silent recordings, and processes that can be killed.

Run as a script it is the process that forks the runs: importing everything takes seconds, a fork takes none.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

import kvstore
from kvstore.cli.main import main

ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(Path(kvstore.__file__).parents[1]), str(Path(__file__).parents[1])]),
}
_PATIENCE_S = 60.0
_RECORDER = Path(__file__).parents[1] / "examples" / "record_screen.py"


def save_tiny_model(folder: Path, seed: int = 0, head_dim: int = 16) -> Path:
    """Save a random Llama of two layers that reads bytes; models of two seeds differ in their weights only."""
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {sign: number for number, sign in enumerate([*signs, "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers_logging.disable_progress_bar()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=head_dim,
        bos_token_id=None,
        eos_token_id=len(signs),
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def record_silently(folder: Path, hours: float) -> Path:
    """Record screens without a sound track: writing down speech needs a large model."""
    spoken, silent = folder / "spoken.mp4", folder / "silent.mp4"
    subprocess.run([sys.executable, str(_RECORDER), "--out", str(spoken), "--hours", str(hours)], check=True)
    with av.open(str(spoken)) as source, av.open(str(silent), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:  # the last packet is empty
                packet.stream = stream
                target.mux(packet)
    return silent


@dataclass(frozen=True, slots=True)
class Done:
    """How a run of the command ended."""

    code: int
    out: str
    err: str

    def check_error(self, *parts: str) -> None:
        """One line on stderr that names `parts`, nothing on stdout, exit code 2."""
        assert (self.code, self.out) == (2, ""), self
        assert self.err.startswith("kvstore: error: "), self.err
        assert self.err.count("\n") == 1, self.err
        for part in parts:
            assert part in self.err


def run_process(*arguments: str | Path) -> Done:
    """Run the command in a process of its own."""
    command = [sys.executable, "-m", "kvstore", *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120, check=False)
    return Done(run.returncode, run.stdout, run.stderr)


@dataclass(frozen=True, slots=True)
class Run:
    """A forked process that runs the command."""

    nursery: Nursery
    pid: int
    output: Path

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; the process is not collected before `wait`, so its id is not used again."""
        os.kill(self.pid, number)

    def wait_until(self, is_reached: Callable[[], bool]) -> None:
        """Wait for something that the run does; fails after a minute."""
        give_up_s = time.monotonic() + _PATIENCE_S
        while not is_reached():
            assert time.monotonic() < give_up_s, self.output.with_suffix(".err").read_text()
            time.sleep(0.02)

    def wait(self) -> Done:
        """Wait for the end; a process that was killed has a negative code."""
        code = int(self.nursery.ask(f"wait {self.pid}"))
        out, err = (self.output.with_suffix(suffix).read_text() for suffix in (".out", ".err"))
        return Done(code, out, err)


class Nursery:
    """The process that forks runs, as a test sees it."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process = process
        self._folder = folder
        self._num_runs = 0

    def ask(self, line: str) -> str:
        """Send a line, return the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().rstrip("\n")

    def start(self, *arguments: str | Path) -> Run:
        """Start the command."""
        self._num_runs += 1
        output = self._folder / f"run-{self._num_runs}"
        pid = int(self.ask("start " + json.dumps([str(output), *map(str, arguments)])))
        return Run(self, pid, output)

    def run(self, *arguments: str | Path) -> Done:
        """Run the command to its end."""
        return self.start(*arguments).wait()


@contextmanager
def open_nursery(folder: Path) -> Iterator[Nursery]:
    """Start the process that forks runs; their output goes to `folder`."""
    command = [sys.executable, __file__]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        yield Nursery(process, folder)
        assert process.stdin is not None
        process.stdin.close()


def _serve() -> None:
    # What a run would import, so that its fork has it.
    import kvstore.video.ask
    import kvstore.video.ingest
    import kvstore.video.model  # noqa: F401

    for line in sys.stdin:
        verb, _, rest = line.rstrip("\n").partition(" ")
        answer = _start(json.loads(rest)) if verb == "start" else _wait(int(rest))
        os.write(1, f"{answer}\n".encode())


def _start(arguments: Sequence[str]) -> int:
    output, *words = arguments
    descriptors = [os.open(f"{output}{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for suffix in (".out", ".err")]
    child = os.fork()
    if child == 0:
        code = 70
        try:
            for number, descriptor in enumerate(descriptors, start=1):
                os.dup2(descriptor, number)
            code = main(words)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    for descriptor in descriptors:
        os.close(descriptor)
    return child


def _wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    _serve()
