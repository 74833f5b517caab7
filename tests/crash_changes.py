# SPDX-License-Identifier: Apache-2.0
"""What the writers of the crash matrix do, to which store, and what there may be before and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kvstore.store import Durability, NewObject, Outcome, Store
from kvstore.tiers.upkeep.compact import Compactor
from kvstore.tiers.upkeep.import_stream import import_stream
from kvstore.tiers.upkeep.repair import Repairer
from tests.store_blocks import EXTENT_NBYTES, HEADER, block_key, make_blocks, make_slot

NUM_BLOCKS = 6
PLAIN = range(100, 120)
BUDGET_NBYTES = (1 << 19) + 30 * EXTENT_NBYTES
OLD = (
    NewObject("index", 0, 2, [b"old" * 3000, b"", b"and"]),
    NewObject("state", NUM_BLOCKS, NUM_BLOCKS, [b"state" * 900]),
)
NEW = (
    NewObject("index", 0, 3, [b"new" * 5000]),
    NewObject("index", 1, NUM_BLOCKS + 1, [b"more" * 5000, b"behind an append"]),
    OLD[1],
)


@dataclass(frozen=True, slots=True)
class Change:
    """Something that a writer does, and what there may be before and after.

    Args:
        run: what it does.
        before: entries of each stream before.
        after: entries of each stream after.
        stored: plain blocks that are there once it is acknowledged.
        objects: what a stream has after, as far as it is long enough.
        is_repair: there is damage before; a repair that ended early is done again.
    """

    run: Callable[[Store], object]
    before: dict[str, int]
    after: dict[str, int]
    stored: range = range(0)
    objects: Sequence[NewObject] = OLD
    is_repair: bool = False


def append(store: Store) -> None:
    """A flush makes an append durable; with durability `sync` the append itself."""
    store.append("lecture", make_blocks(2, NUM_BLOCKS), {"next": NUM_BLOCKS + 2})
    if store._disk.config.durability is not Durability.SYNC:
        store.flush()


def put_into_a_full_store(store: Store) -> None:
    numbers = range(200, 216)
    store.put([block_key(number) for number in numbers], [make_slot(number) for number in numbers], [40] * 16)


def put(store: Store) -> None:
    assert (
        store.put([block_key(200), block_key(201)], [make_slot(200), make_slot(201)], [40, 40]) == [Outcome.STORED] * 2
    )


def import_another(store: Store) -> None:
    assert not import_stream(store._disk, store._pool, store._disk.folder.with_name("exported")).missing


def compact(store: Store) -> None:
    store.remove([block_key(number) for number in PLAIN[::2]])
    Compactor(store._disk, store._pool, 4 * EXTENT_NBYTES).run()


def start_another(store: Store) -> None:
    store.create_stream(replace(HEADER, name="other"))
    store.append("other", make_blocks(3, 0), {"next": 3})
    store.put_objects("other", OLD[:1])
    store.flush()


def adopt(store: Store) -> None:
    """A stream that has a cursor alone, and then what another holds."""
    store.create_stream(replace(HEADER, name="other"))
    store.append("other", [], {"next": NUM_BLOCKS})
    store.flush()
    keys = [block_key(number) for number in range(NUM_BLOCKS)]
    assert store.adopt("other", lambda parent, first, num_tokens: keys[first // 40], "state") == 40 * NUM_BLOCKS


def put_objects(store: Store) -> None:
    store.append("lecture", make_blocks(2, NUM_BLOCKS), {"next": NUM_BLOCKS + 2})
    store.put_objects("lecture", NEW)
    store.flush()


CHANGES = {
    "append": Change(append, {"lecture": NUM_BLOCKS}, {"lecture": NUM_BLOCKS + 2}),
    "start_another": Change(start_another, {"lecture": NUM_BLOCKS}, {"lecture": NUM_BLOCKS, "other": 3}),
    "put_objects": Change(put_objects, {"lecture": NUM_BLOCKS}, {"lecture": NUM_BLOCKS + 2}, objects=NEW),
    "remove_stream": Change(lambda store: store.remove_stream("lecture"), {"lecture": NUM_BLOCKS}, {}),
    "put_into_a_full_store": Change(put_into_a_full_store, {"lecture": NUM_BLOCKS}, {"lecture": NUM_BLOCKS}),
    "compact": Change(compact, {"lecture": NUM_BLOCKS}, {"lecture": NUM_BLOCKS}, stored=PLAIN[1::2]),
    "put": Change(put, {"lecture": NUM_BLOCKS}, {"lecture": NUM_BLOCKS}, stored=range(200, 202)),
    "fork": Change(
        lambda store: store.fork("lecture", "other", 120, {"next": 3}),
        {"lecture": NUM_BLOCKS},
        {"lecture": NUM_BLOCKS, "other": 3},
    ),
    "adopt": Change(adopt, {"lecture": NUM_BLOCKS}, {"lecture": NUM_BLOCKS, "other": NUM_BLOCKS}),
    "rollback": Change(
        lambda store: store.rollback("lecture", 160, {"next": 4}), {"lecture": NUM_BLOCKS}, {"lecture": 4}
    ),
    "repair": Change(
        lambda store: Repairer(store._disk, store._pool).run(),
        {"lecture": NUM_BLOCKS},
        {"lecture": NUM_BLOCKS},
        stored=PLAIN[1:],
        is_repair=True,
    ),
    "import": Change(
        import_another, {"lecture": NUM_BLOCKS}, {"lecture": NUM_BLOCKS, "other": NUM_BLOCKS + 2}, stored=PLAIN[-1:]
    ),
    "close": Change(lambda store: store.close(), {"lecture": NUM_BLOCKS}, {"lecture": NUM_BLOCKS}),
}
