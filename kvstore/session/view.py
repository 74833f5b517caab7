# SPDX-License-Identifier: Apache-2.0
"""One stream as a model sees it: settings, entries, positions, device slots, index."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.errors import ConfigError, CorruptRecordError, StreamNotFoundError
from kvstore.layout import BlockLayout
from kvstore.retrieval.maxsim import LateInteraction
from kvstore.retrieval.policy import Policy
from kvstore.retrieval.positions import PositionPolicy
from kvstore.retrieval.summary import Summary, SummaryKind
from kvstore.retrieval.tokens import Rotate, Space
from kvstore.session.late.ranking import LateRanking
from kvstore.session.reading.differences import DifferenceReader
from kvstore.session.reading.past import PastReader
from kvstore.session.residency import Residency
from kvstore.session.stream_memory import StreamMemory
from kvstore.store import Entries, Entry, Store, StreamHeader
from kvstore.tiers.device.pool import DevicePool
from kvstore.tiers.manifest import JSON, Manifest

_MIN_SLOTS = 16
_THINNED = ";retention="


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """How a stream is attended while it grows, and what a question may read.

    Args:
        policy: what a question retrieves by.
        window_tokens: most recent tokens that an appending forward attends to, rounded up to whole blocks.
        sink_tokens: first tokens of the stream, attended always (StreamingLLM, arXiv:2309.17453), rounded up to whole
            blocks.
        budget_tokens: most tokens of retrieved blocks per question.
        device_nbytes: size of the device pool.
        load_timeout_s: seconds that a question waits for its blocks each time it loads some; it goes on without those
            that come later. None waits for all. Appending always does: what it stores must not depend on the disk.
        trained_tokens: positions that the model was trained for: a policy whose rule ends there is replaced by the one
            behind it; 0 when that is not known, as for a stream that is longer.
        prefetch_tokens: tokens of the next best blocks that are brought to host memory after a question has chosen for
            all layers, while nobody waits for the disk; 0 brings none.

    Raises:
        ConfigError: a size or the time is negative, or the window is empty.
    """

    policy: Policy
    window_tokens: int = 1024
    sink_tokens: int = 16
    budget_tokens: int = 128
    device_nbytes: int = 256 << 20
    load_timeout_s: float | None = None
    prefetch_tokens: int = 0
    trained_tokens: int = 0

    def __post_init__(self) -> None:
        if self.window_tokens < 1:
            raise ConfigError(f"window_tokens is {self.window_tokens}; it must be positive")
        for name in ("sink_tokens", "budget_tokens", "device_nbytes", "prefetch_tokens", "trained_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.load_timeout_s is not None and not self.load_timeout_s >= 0:
            raise ConfigError(f"load_timeout_s is {self.load_timeout_s}; use seconds from 0 on, or None")

    @property
    def prefill(self) -> str:
        """How keys and values of an appended token come about: a part of every block's name."""
        retrieval = "none"
        if self.policy.retrieves_while_appending:  # what is read of the past decides what comes behind it
            retrieval = f"{self.policy.name},{self.budget_tokens}"
        thinning = f"{_THINNED}{self.policy.retention}" if self.policy.retention is not None else ""
        return f"window={self.window_tokens};sinks={self.sink_tokens};retrieval={retrieval}{thinning}"


@dataclass(frozen=True, slots=True)
class OpenRows:
    """Tokens that are in a slot but not yet a block: the slot, how many, and their positions `[rows, filled]`."""

    slot_idx: int
    filled: int
    positions: Tensor


class StreamView:
    """What is known of a stream, by the process that attends to it. Not thread-safe: the engine's thread owns it.

    Args:
        store: the open store.
        header: the stream's header, as the store returned it.
        config: see `SessionConfig`.
        rotate: the model's rotary function; None where keys arrive rotated.
        device: where attention runs.
        rows: rows of a position: 1, or 3 for M-RoPE.

    Raises:
        ConfigError: keys are stored rotated and the policy would move them.
        StreamNotFoundError: the store has no such stream.
        CorruptRecordError: the stream's entries are damaged.
    """

    def __init__(
        self,
        store: Store,
        header: StreamHeader,
        config: SessionConfig,
        rotate: Rotate | None,
        device: torch.device,
        rows: int,
    ) -> None:
        policy = config.policy
        is_fixed = policy.position is PositionPolicy.ORIGINAL
        if rotate is None and not (is_fixed and all(view.space is Space.ROTATED for view in policy.views)):
            raise ConfigError(
                f"policy {policy.name} moves keys or compares them before RoPE, and these are stored rotated; "
                "use one that leaves them where they are, such as quest"
            )
        self.store = store
        self.header = header
        self.config = config
        self.rotate = rotate
        self.rows = rows
        self.layout = BlockLayout(header.spec, header.block_tokens)
        num_slots = max(config.device_nbytes // self.layout.slot_nbytes, _MIN_SLOTS)
        self.residency = Residency(DevicePool(self.layout, num_slots, device), store, header.name)
        self.is_thinned = _THINNED in header.prefill
        self.has_positions = rows > 1 or self.is_thinned
        """Whether positions are stored, because they are not the numbers of the tokens."""
        self.reader = PastReader(self.residency, rows, has_positions=self.has_positions)
        self.differences = DifferenceReader(self.residency, self.reader)
        self.open_rows: list[OpenRows] = []
        self.entries = Entries()
        self.cursor: dict[str, JSON] = {}
        self.num_sink_blocks = 0
        self._positions: dict[int, Tensor] = {}
        self._searches: dict[Policy, LateRanking | StreamMemory] = {}
        self._manifest: Manifest | None = None
        self.reload()

    @property
    def policy(self) -> Policy:
        """What a question retrieves by now."""
        policy = self.config.policy
        is_long = self.sequence_length > self.config.trained_tokens
        return policy.beyond if policy.beyond is not None and is_long and self.rotate is not None else policy

    @property
    def damaged(self) -> dict[int, str]:
        """Blocks that could not be searched, by index, with the reason."""
        return {index: why for search in self._searches.values() for index, why in search.damaged.items()}

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.header.spec.num_layers

    @property
    def num_tokens(self) -> int:
        """Tokens of the stream before the running forward."""
        return self.entries.end_token + sum(rows.filled for rows in self.open_rows)

    @property
    def sequence_length(self) -> int:
        """What an engine counts on from: tokens that were read, kept or not.

        Under M-RoPE, which counts positions by itself (`end_position`), those that are kept.
        """
        return self.end_position if self.rows == 1 else self.num_tokens

    @property
    def end_position(self) -> int:
        """RoPE position that follows the last token, or the last one whose position can be read."""
        if self.open_rows:
            return int(self.open_rows[-1].positions.max()) + 1
        for entry in reversed(self.entries):
            with suppress(CorruptRecordError):
                return int(self.positions_of(entry).max()) + 1
        return 0

    def reload(self) -> None:
        """See what another process has appended since, or that the stream is not the same any more.

        Raises:
            StreamNotFoundError: the stream was removed, or replaced by another.
            CorruptRecordError: its entries are damaged.
        """
        known = self._manifest
        manifest = self.store.manifest(self.header.name, known)
        if manifest.header != self.header:
            raise StreamNotFoundError(f"stream {self.header.name!r} was replaced by another; open it again")
        entries = Entries.of(manifest.entries)
        has_grown = known is not None and manifest.lineage == known.lineage and len(known.entries) <= len(entries)
        num_known = len(known.entries) if known is not None and has_grown else 0
        self._check(entries, num_known, manifest.num_tokens)
        if not has_grown or self.entries[num_known:] != entries[num_known : len(self.entries)]:
            self._positions, self._searches, self.num_sink_blocks = {}, {}, 0  # rolled back, and maybe written on
        self._manifest = manifest
        self.entries = entries
        self.cursor = dict(manifest.cursor)
        self.note_sinks()

    def _check(self, entries: Entries, num_known: int, num_tokens: int) -> None:
        """Refuse entries behind the first `num_known` that do not follow each other, or not up to `num_tokens`."""
        firsts, sizes = entries.first_tokens[num_known:], entries.sizes[num_known:]
        expected = entries[:num_known].end_token + sizes.cumsum(0) - sizes
        is_wrong = (firsts != expected) | (sizes < 1) | (sizes > self.header.block_tokens)
        if bool(is_wrong.any()):
            number = int(is_wrong.nonzero()[0])
            raise CorruptRecordError(
                f"stream {self.header.name!r}: entry {num_known + number} says {int(sizes[number])} tokens from "
                f"{int(firsts[number])} on, where token {int(expected[number])} is next and a block holds "
                f"{self.header.block_tokens}"
            )
        if entries.end_token != num_tokens:
            raise CorruptRecordError(
                f"stream {self.header.name!r}: its entries hold {entries.end_token} tokens, {num_tokens} are announced"
            )

    def search(self, policy: Policy) -> LateRanking | StreamMemory:
        """What a policy that retrieves searches the stream by; made when it is first asked for."""
        if policy == self.config.policy.beyond == self.policy:  # a stream only grows: the one before is not asked again
            self._searches.pop(self.config.policy, None)
        if policy not in self._searches:
            late = policy.late
            made = self.new_ranking(late) if late is not None else self.new_memory(policy)
            self._searches[policy] = made
        return self._searches[policy]

    def new_ranking(self, rule: LateInteraction) -> LateRanking:
        """What a policy of late interaction ranks by, of nobody else."""
        return LateRanking(self.store, self.header, rule)

    def new_memory(self, policy: Policy) -> StreamMemory:
        """What a policy with views selects from, of nobody else."""
        return StreamMemory(self.store, self.header, policy, self.rotate, self.positions_of)

    def note_sinks(self) -> None:
        """Count the leading blocks that begin within `sink_tokens`."""
        firsts = self.entries.first_tokens
        self.num_sink_blocks = int(torch.searchsorted(firsts, torch.tensor(self.config.sink_tokens)))

    def first_block_within(self, num_tokens: int) -> int:
        """The newest block from which on at least `num_tokens` tokens remain; open rows count.

        Not those that will be thinned: fewer of them will be left, and the block must not move back then. A small block
        counts as a quarter of a full one: it takes a slot all the same, so a window of short texts must end before the
        pool does.
        """
        least = self.layout.block_tokens // 4
        left = num_tokens - (0 if self.is_thinned else sum(rows.filled for rows in self.open_rows))
        first = len(self.entries)
        sizes = self.entries.sizes
        while first > 0 and left > 0:
            first -= 1
            left -= max(int(sizes[first]), least)
        return first

    def positions_of(self, entry: Entry) -> Tensor:
        """RoPE positions of a block: `[rows, num_tokens]` int64.

        Raises:
            CorruptRecordError: they are stored (M-RoPE, or a thinned stream) and cannot be read.
        """
        if not self.has_positions:
            return torch.arange(entry.first_token, entry.first_token + entry.num_tokens)[None]
        if entry.index not in self._positions:
            stored = self.store.summaries(self.header.name, entry.index, 1)
            self.note_positions(entry, stored.get(entry.index, b""))
        return self._positions[entry.index].long()

    def note_positions(self, entry: Entry, summary: bytes) -> None:
        """Keep a block's positions from its stored summary: a block that was just appended cannot be read back yet.

        Raises:
            CorruptRecordError: there are none.
        """
        if not self.has_positions:
            return
        positions = Summary.from_bytes(summary).parts.get(SummaryKind.POSITION)
        if positions is None and self.rows == 1:
            positions = torch.arange(entry.first_token, entry.first_token + entry.num_tokens, dtype=torch.int32)[None]
        if positions is None or positions.shape != (self.rows, entry.num_tokens):
            raise CorruptRecordError(f"block {entry.index} of {self.header.name!r} has no usable positions")
        self._positions[entry.index] = positions

    def open_planes(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values `[kv_heads, count, dim]` of the open rows in one layer."""
        pool = self.residency.pool
        return [
            (pool.keys(rows.slot_idx)[layer, :, : rows.filled], pool.values(rows.slot_idx)[layer, :, : rows.filled])
            for rows in self.open_rows
        ]
