# SPDX-License-Identifier: Apache-2.0
"""Transport to a server that speaks RESP2: Redis, Valkey and their kin. Commands of a batch go out together."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.errors import StoreIOError
from kvstore.native import Arena
from kvstore.remote.resp import Endpoint, Refusal, RespConnection
from kvstore.remote.transport import Link, Memory, Span
from kvstore.tiers.base import Outcome

_MAX_COMMANDS = 128
"""Commands under way at once: their answers, a few bytes each, must fit the socket while the last are being sent."""

_AHEAD_NBYTES = 2 << 20
"""Values that are asked for before the first has come."""


class RedisTransport:
    """One server. Values are plain strings; the server's own persistence and eviction are its owner's choice.

    Args:
        endpoint: how to reach it.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    @property
    def place(self) -> str:
        """Where the server is."""
        return str(self._endpoint)

    def connect(self, memory: Memory, deadline_s: float) -> Link:
        """Open a connection of its own for this link."""
        return _RedisLink(self._endpoint, memory, deadline_s)

    def allocate(self, nbytes: int) -> Memory:
        """Plain memory."""
        return Arena(nbytes, False)

    def free(self, memory: Memory) -> None:
        """Nobody writes to it behind our back: it goes with the last reference."""

    def close(self) -> None:
        """Nothing is shared."""


class _RedisLink:
    """See `Link`."""

    def __init__(self, endpoint: Endpoint, memory: Memory, deadline_s: float) -> None:
        self._endpoint = endpoint
        self._memory = memoryview(memory)
        self._connection = RespConnection(endpoint, deadline_s)

    def put(
        self, keys: Sequence[str], values: Sequence[Span], deadline_s: float, *, replace: bool = False
    ) -> list[Outcome]:
        """SET, which always replaces."""
        outcomes: list[Outcome] = []
        for first in range(0, len(keys), _MAX_COMMANDS):
            some = slice(first, first + _MAX_COMMANDS)
            pairs = zip(keys[some], values[some], strict=True)
            commands: list[list[bytes | memoryview]] = [
                [b"SET", key.encode(), self._part(value)] for key, value in pairs
            ]
            self._connection.send(commands, deadline_s)
            outcomes += [self._stored() for _ in commands]
        return outcomes

    def get(self, keys: Sequence[str], rooms: Sequence[Span], deadline_s: float) -> list[int | Outcome]:
        """GET, a few ahead: a server that has read many commands copies all their values before it sends the first."""
        found: list[int | Outcome] = []
        num_asked = 0
        ahead = max(2, min(_MAX_COMMANDS, _AHEAD_NBYTES // max(room.nbytes for room in rooms))) if rooms else 0
        while len(found) < len(keys):
            if num_asked - len(found) <= ahead // 2:
                some = keys[num_asked : len(found) + ahead]
                self._connection.send([[b"GET", key.encode()] for key in some], deadline_s)
                num_asked += len(some)
            nbytes = self._connection.read_value(self._part(rooms[len(found)]))
            if nbytes == -1:
                # The rest of the batch is asked for again: to read past a value that may be terabytes takes longer.
                found.append(Outcome.DAMAGED)
                self._connection.close()
                self._connection = RespConnection(self._endpoint, deadline_s)
                num_asked = len(found)
            else:
                found.append(self._found(nbytes))
        return found

    def exists(self, keys: Sequence[str], deadline_s: float) -> list[bool]:
        """EXISTS."""
        return self._ask(b"EXISTS", keys, deadline_s)

    def remove(self, keys: Sequence[str], deadline_s: float) -> list[bool]:
        """DEL."""
        return self._ask(b"DEL", keys, deadline_s)

    def close(self) -> None:
        """Hang up."""
        self._connection.close()
        self._memory.release()

    def _part(self, span: Span) -> memoryview:
        return self._memory[span.offset : span.offset + span.nbytes]

    def _stored(self) -> Outcome:
        answer = self._connection.read_line()
        if isinstance(answer, Refusal) and answer.text.startswith("OOM"):
            return Outcome.FULL
        if answer != "OK":
            raise self._refused(answer)
        return Outcome.STORED

    def _found(self, nbytes: int | Refusal | None) -> int | Outcome:
        if nbytes is None:
            return Outcome.MISS
        if isinstance(nbytes, Refusal):
            if nbytes.text.startswith("WRONGTYPE"):  # a list, a hash: somebody else's
                return Outcome.DAMAGED
            raise self._refused(nbytes)
        return nbytes

    def _ask(self, verb: bytes, keys: Sequence[str], deadline_s: float) -> list[bool]:
        answers: list[bool] = []
        for first in range(0, len(keys), _MAX_COMMANDS):
            commands = [[verb, key.encode()] for key in keys[first : first + _MAX_COMMANDS]]
            self._connection.send(commands, deadline_s)
            for _ in commands:
                answer = self._connection.read_line()
                if not isinstance(answer, int):
                    raise self._refused(answer)
                answers.append(answer > 0)
        return answers

    def _refused(self, answer: int | str | Refusal) -> StoreIOError:
        text = answer.text if isinstance(answer, Refusal) else f"unexpected answer {answer!r}"
        return StoreIOError(f"{self._endpoint}: {text}")
