# SPDX-License-Identifier: Apache-2.0
"""Entry point of the kvstore command: parses arguments, runs one command, turns errors into one line and a code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from kvstore.errors import BusyError, KVStoreError, SpecMismatchError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
_EXIT_PIPE = 141

_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
"""Set before torch is loaded, unless the user has set them. Threads that spin while they wait take the cores from OCR
and decoding (2.5 times slower on 2 busy cores); and oneDNN keeps up to 1,024 compiled kernels, one per length of text,
which would grow the process with the video."""

_ADVICE: dict[type[KVStoreError], str] = {
    BusyError: "wait until it is done, or stop it",
    SpecMismatchError: "give the model that wrote it with --model",
}
"""What to do about errors whose raisers cannot know about command lines."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        0 when all went well, 1 when something stored is damaged or missing, 2 for an error that the user can act on,
        130 after Ctrl-C.
    """
    try:
        options = _parser().parse_args(argv)
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        code: int = options.run(options)
        sys.stdout.flush()
    except KVStoreError as error:
        print(f"kvstore: error: {_explained(error)}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("kvstore: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader has seen enough; the interpreter must not fail over what is still buffered.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_PIPE
    return code


def _parser() -> argparse.ArgumentParser:
    # Here, where Ctrl-C is caught: importing them takes a moment.
    from kvstore.cli import (
        ask,
        bench,
        calibrate,
        counters,
        exporting,
        ingest,
        inspection,
        mending,
        removal,
        sharing,
        streams,
        verify,
    )

    parser = argparse.ArgumentParser(
        prog="kvstore",
        description="Turns long videos into streams of KV cache on disk, and answers questions from them.",
        epilog="Exit codes: 0 all went well, 1 something is damaged or missing, 2 error, 130 interrupted.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (
        ingest.add_command,
        ask.add_command,
        streams.add_command,
        inspection.add_command,
        counters.add_command,
        calibrate.add_command,
        verify.add_command,
        mending.add_commands,
        exporting.add_commands,
        sharing.add_command,
        removal.add_command,
        bench.add_command,
    ):
        add(commands)
    return parser


def _explained(error: KVStoreError) -> str:
    advice = next((words for kind, words in _ADVICE.items() if isinstance(error, kind)), None)
    message = " ".join(str(error).split())
    return f"{message}; {advice}" if advice else message
