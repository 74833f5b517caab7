# SPDX-License-Identifier: Apache-2.0
"""A stream attached to a running model: forwards append to it, full blocks leave the device, questions branch off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvstore.errors import ConfigError, CorruptRecordError, ReadOnlyError, ShapeError, StoreIOError
from kvstore.retrieval.fusion import ExtraScores
from kvstore.retrieval.summary import summarise
from kvstore.retrieval.tokens import Rotate
from kvstore.session.append_window import AppendWindow
from kvstore.session.appender import Appender, Segment
from kvstore.session.attention_inputs import AttentionInputs
from kvstore.session.branch import Branch
from kvstore.session.late.appended import note_keys
from kvstore.session.state import save_state
from kvstore.session.stream_memory import StreamMemory
from kvstore.session.view import OpenRows, SessionConfig, StreamView
from kvstore.store import Store, StreamHeader
from kvstore.tiers.manifest import JSON


class Session:
    """The growing end of one stream, in the process that runs the model.

    Each forward calls `extend` once per layer, in order of layers; one that fails midway leaves nothing. After an
    append that the store could not write, the session refuses to go on: its blocks are not the store's any more. Not
    thread-safe: the engine's thread owns it.

    Args:
        store: an open store; a reader can only ask.
        header: the stream's header, as the store returned it.
        config: see `SessionConfig`.
        rotate: the model's rotary function; None where keys arrive rotated.
        device: where attention runs.
        rows: rows of a position: 1, or 3 for M-RoPE.

    Raises:
        ConfigError: the stream was written with another window, sinks or retrieval.
        CorruptRecordError: a block that the next forward attends to is damaged or gone.
    """

    @torch.inference_mode(False)  # its memory is written in every mode
    def __init__(
        self,
        store: Store,
        header: StreamHeader,
        config: SessionConfig,
        rotate: Rotate | None,
        device: torch.device,
        rows: int = 1,
    ) -> None:
        self.view = StreamView(store, header, config, rotate, device, rows)
        self._window = AppendWindow(self.view)
        self._appender: Appender | None = None
        self._is_broken = False
        self._next_cursor: dict[str, JSON] | None = None
        self.num_spare = 0
        """Last tokens of the coming forward that only fill it up: they vote for nothing, and go when it ends."""
        if store.is_writable:
            self._open_appender()

    @property
    def num_tokens(self) -> int:
        """Tokens of the stream before the running forward."""
        return self.view.num_tokens

    def segment(self, num_tokens: int, start_s: float, end_s: float, group: int) -> None:
        """Announce that the next `num_tokens` tokens form one block with this media span.

        Raises:
            ReadOnlyError: the store was opened for reading.
            ConfigError: the block would not fit a slot.
        """
        self._writer().segment(Segment(num_tokens, start_s, end_s, group))

    def extend(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, ids: Tensor, scale: float
    ) -> AttentionInputs:
        """Append one layer of a forward's tokens to the stream.

        Args:
            layer: layer index; layer 0 comes first.
            query: [1, num_heads, num_new, key_dim] in the stream's key space.
            keys: [1, kv_heads, num_new, key_dim].
            values: [1, kv_heads, num_new, value_dim].
            positions: [rows, 1, num_new] int64.
            ids: [num_new] int64 token ids, or content hashes where tokens have no id.
            scale: multiplies the logits.

        Returns:
            What the attention kernel needs.

        Raises:
            ShapeError: more than one sequence: a stream is one; use a branch. Positions that do not continue it. A
                layer out of turn, or tensors that do not fit the model.
            StoreIOError: an earlier append failed.
            ReadOnlyError: the store was opened for reading.
            CapacityError: no slot is free.
        """
        if keys.shape[0] != 1:
            raise ShapeError(f"a stream is one sequence; a batch of {keys.shape[0]} needs a branch")
        if ids.shape != keys.shape[2:3]:
            raise ShapeError(f"ids are {list(ids.shape)}; {keys.shape[2]} tokens have as many, in one dimension")
        appender = self._writer()
        self._window.check(layer, query, keys, values, positions)
        if layer == 0:
            self._check_positions(positions)
            self.commit()
            if self._window.retrieves:
                self.flush()
            self._window.slide()
        self._window.assemble(layer, query[:, :, : query.shape[2] - self.num_spare], positions)
        if layer == 0:
            appender.begin(ids, positions[:, 0])
        appender.write(layer, keys[0], values[0])
        inputs = self._window.inputs(layer, query, keys, values, positions)
        appender.receive(inputs.received(appender.num_open_tokens, self.num_spare, scale))
        if layer == self.view.num_layers - 1:
            appender.end(self.num_spare)
            self._window.is_stale = self.num_spare > 0
            self.num_spare = 0
            self._note_open_rows()
        return inputs

    def commit(self, cursor: Mapping[str, JSON] | None = None, *, partial: bool = False) -> None:
        """Hand complete blocks to the store; returns before they are durable (see `flush`).

        A cursor without blocks waits for those before it. Of a stream that is thinned, complete blocks wait until they
        are a run, and the cursor with them: a resumed producer begins where the last run ended.

        Args:
            cursor: where the producer stands once these blocks are stored; None keeps the last one.
            partial: also close the last block although it has room, and thin what is there.

        Raises:
            CapacityError, StoreIOError: what the store's writer met since the last call; this session is of no more
                use then.
        """
        self._forget_unfinished()
        appender, view = self._writer(), self.view
        self._is_broken = True  # unless all of this goes well: blocks leave the appender first
        blocks = appender.close_partial() if partial else appender.finish()
        if cursor is not None:
            self._next_cursor = dict(cursor)
        taken = None if appender.is_waiting else self._next_cursor
        if taken is not None:
            view.cursor, self._next_cursor = taken, None
            if not blocks:
                self._make_sure()  # the store would notice a gap before new blocks, but not before a cursor
        if blocks or taken is not None:
            view.store.append(view.header.name, blocks, view.cursor)
            view.entries = view.entries.followed_by(block.entry for block in blocks)
            for block in blocks:
                view.note_positions(block.entry, block.summary)
            view.note_sinks()
            note_keys(view, blocks)
        if blocks and view.is_thinned:
            self._window.is_stale = True  # it sees less of them now
        self._is_broken = False
        self._note_open_rows()
        if blocks:
            self._keep_views()

    def flush(self) -> None:
        """Wait until what was committed is durable; raises like `commit`."""
        self._writer()
        self._make_sure()

    def save_state(self, parts: Sequence[bytes | memoryview]) -> None:
        """Store what the model keeps of the stream beside keys and values, as it is now; see `kvstore.session.state`.

        Closes the last block although it has room: a state stands for whole blocks. Returns before it is durable.

        Args:
            parts: the state; what was saved at this place before goes.

        Raises:
            CapacityError, StoreIOError: like `commit`.
            ConfigError: more parts or bytes than an object may have.
        """
        self.commit(partial=True)
        view = self.view
        save_state(view.store, view.header.name, next(reversed(view.entries), None), parts)

    def drop(self, num_tokens: int) -> None:
        """Forget the last tokens (assisted decoding); only tokens that are not handed on yet.

        Raises:
            ConfigError: some of them are stored already.
        """
        self._forget_unfinished()
        self._writer().drop(num_tokens)
        self._window.is_stale = True
        self._note_open_rows()

    def branch(
        self, *, continues: bool = False, external: Sequence[ExtraScores] = (), recent_tokens: int = 0
    ) -> Branch:
        """Start a question: it sees the stream as it is now and leaves nothing in it.

        Args:
            continues: number its tokens on from the stream's end instead of from 0.
            external: scores of the stream's blocks; see `Branch`.
            recent_tokens: of the stream's end, that it reads at least.

        Raises:
            ConfigError: `recent_tokens` is negative.
        """
        if recent_tokens < 0:
            raise ConfigError(f"recent_tokens is {recent_tokens}; it must not be negative")
        if self._appender is not None:
            self.commit()
            self.flush()
        return Branch(self.view, continues=continues, external=external, recent_tokens=recent_tokens)

    def _writer(self) -> Appender:
        if self._appender is None:
            raise ReadOnlyError(f"stream {self.view.header.name!r} is open for reading; open the store for writing")
        if self._is_broken:
            raise StoreIOError(
                f"stream {self.view.header.name!r}: an earlier append failed, and blocks were dropped; open the stream "
                "again: it continues from the cursor in its manifest"
            )
        return self._appender

    def _make_sure(self) -> None:
        """Wait for the store, and see that the stream has its last block: a failure is told once, maybe to another."""
        store, last = self.view.store, self.view.entries[-1:]
        try:
            store.flush()
            self._is_broken = not all(store.summaries(self.view.header.name, entry.index, 1) for entry in last)
        except Exception:
            self._is_broken = True
            raise
        self._writer()

    def _keep_views(self) -> None:
        """Keep what questions search by, now and then: a process that asks need not read all keys then."""
        view = self.view
        search = view.search(view.policy) if view.policy.views else None
        if isinstance(search, StreamMemory) and search.is_to_keep(view.entries):
            self._make_sure()
            search.keep(view.num_sink_blocks, view.entries)
            search.show_pending()  # to a question that is being answered

    def _open_appender(self) -> None:
        view = self.view
        header, wanted = view.header, view.config.prefill
        if header.prefill != wanted:
            raise ConfigError(
                f"stream {header.name!r} was written with {header.prefill}, not {wanted}; "
                "use the same settings or another stream"
            )
        thinning = view.config.policy.retention
        if thinning is not None and view.rotate is None:
            raise ConfigError(
                f"stream {header.name!r}: its keys are stored rotated, and tokens are compared before RoPE to choose "
                "those that are kept; use a policy without retention"
            )
        last = next(reversed(view.entries), None)
        self._appender = Appender(view.residency, header.namespace, summarise, last, thinning, view.rotate)
        report = self._window.open()
        if report.lost:
            raise CorruptRecordError(
                f"stream {header.name!r}: its last blocks cannot be read ({next(iter(report.lost.values()))}), so it "
                "cannot be continued"
            )

    def _forget_unfinished(self) -> None:
        """Drop the tokens of a forward that failed midway: their rows are filled in some layers only."""
        if self._writer().abandon():
            self._window.is_stale = True
            self._note_open_rows()

    def _check_positions(self, positions: Tensor) -> None:
        if self.view.rows > 1:
            return  # stored as they are
        first = self.view.sequence_length
        if not torch.equal(positions[0, 0].cpu(), torch.arange(first, first + positions.shape[2])):
            raise ShapeError(
                f"stream {self.view.header.name!r} goes on at position {first}; the forward has other positions"
            )

    def _note_open_rows(self) -> None:
        self.view.open_rows = [
            OpenRows(block.slot_idx, block.filled, torch.cat(block.positions, dim=1))
            for block in self._writer().open_blocks
        ]
