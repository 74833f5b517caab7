# SPDX-License-Identifier: Apache-2.0
"""`kvstore push` and `kvstore pull`: share a stream with other machines through a server."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from kvstore.cli import arguments, text
from kvstore.cli.progress import Progress

if TYPE_CHECKING:
    from kvstore.remote.sharing.push import ShareReport

_FORMS = "redis://host:6379/namespace or mooncake://host:50051/namespace; docs/remote.md has all forms"


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare both commands and their arguments."""
    for name, run, words, description in (
        ("push", push_stream, "give a stream to a server", "Give a stream, as it stands, to a server: what it lacks."),
        ("pull", pull_stream, "take a stream over from a server", "Take a stream over, or what it has grown by."),
    ):
        parser = commands.add_parser(name, help=words, description=description)
        arguments.add_store(parser, stream=True)
        parser.add_argument("--remote", type=arguments.text, required=True, metavar="URL", help=_FORMS)
        parser.set_defaults(run=run)


def push_stream(options: argparse.Namespace) -> int:
    """Push the stream and say what was sent."""
    from kvstore.cli.stored import find_stream
    from kvstore.remote.address import open_server
    from kvstore.remote.sharing.push import push
    from kvstore.store import Access, Store

    find_stream(options.store, options.stream)
    with (
        open_server(options.remote) as server,
        Store.open(options.store, access=Access.READ) as store,
        Progress(sys.stderr) as progress,
    ):
        report = push(store, server, options.stream, lambda done, total: _show(progress, done, total))
    print(f"pushed {text.printable(options.stream)} to {text.printable(server.place)}: {_moved(report)}")
    return 0


def pull_stream(options: argparse.Namespace) -> int:
    """Pull the stream and say what was fetched."""
    from kvstore.remote.address import open_server
    from kvstore.remote.sharing.pull import find_remote_stream, pull
    from kvstore.store import Access, Store

    with open_server(options.remote) as server:
        find_remote_stream(server, options.stream)  # a writer would make a store, for nothing
        with Store.open(options.store, access=Access.WRITE) as store, Progress(sys.stderr) as progress:
            report = pull(store, server, options.stream, lambda done, total: _show(progress, done, total))
    print(f"pulled {text.printable(options.stream)} from {text.printable(server.place)}: {_moved(report)}")
    return 0


def _show(progress: Progress, done: int, total: int) -> None:
    progress.show(done / total, [f"{done:,}/{text.count(total, 'block')}"])


def _moved(report: ShareReport) -> str:
    whole = text.count(report.num_entries, "block")
    return f"{text.count(report.num_moved, 'block')} moved, {text.size(report.nbytes)}; it holds {whole}"
