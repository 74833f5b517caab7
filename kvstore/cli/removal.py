# SPDX-License-Identifier: Apache-2.0
"""`kvstore rm`: removes a stream and the blocks that only it needs."""

from __future__ import annotations

import argparse

from kvstore.cli import arguments, text


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its arguments."""
    parser = commands.add_parser(
        "rm", help="remove a stream", description="Remove a stream and the blocks that only it needs."
    )
    arguments.add_store(parser, stream=True)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Remove the stream and say what that freed."""
    from kvstore.cli.stored import find_stream
    from kvstore.store import Access, Store

    # A writer would make a store where there is none.
    manifest = find_stream(options.store, options.stream)
    with Store.open(options.store, access=Access.WRITE) as store:
        nbytes = store.remove_stream(options.stream)
    print(
        f"removed {text.printable(options.stream)}: {text.count(len(manifest.entries), 'block')}, "
        f"{text.count(manifest.num_tokens, 'token')}; {text.size(nbytes)} freed"
    )
    return 0
