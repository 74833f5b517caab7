# SPDX-License-Identifier: Apache-2.0
"""One connection that speaks RESP2, the protocol of Redis and Valkey; values go to and from memory without a copy."""

from __future__ import annotations

import re
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from kvstore.errors import StoreIOError

_BUFFER_NBYTES = 16 << 10
_MAX_BUFFERS = 512  # IOV_MAX is 1024; more would be refused
_NUMBER = re.compile(rb"-?[0-9]{1,18}")

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error that the server answered to one command; the connection goes on."""

    text: str


@dataclass(frozen=True, slots=True)
class Endpoint:
    """How to reach a server.

    Args:
        host: name or address; empty for a Unix socket.
        port: of `host`.
        path: of the Unix socket; empty for TCP.
        is_tls: speak TLS and check the server's certificate.
        user: for AUTH; empty for the default user.
        password: for AUTH; empty to go without.
        database: for SELECT.
    """

    host: str = ""
    port: int = 6379
    path: str = ""
    is_tls: bool = False
    user: str = ""
    password: str = ""
    database: int = 0

    def __str__(self) -> str:
        scheme = "rediss" if self.is_tls else "redis"
        return f"redis+unix://{self.path}" if self.path else f"{scheme}://{self.host}:{self.port}"


class RespConnection:
    """A socket and what was read ahead from it. One thread at a time; after a `StoreIOError` it is of no use.

    Args:
        endpoint: the server.
        deadline_s: when to give up connecting, a reading of `time.monotonic`.

    Raises:
        StoreIOError: nobody answers there, or the server refuses the password or the database.
    """

    def __init__(self, endpoint: Endpoint, deadline_s: float) -> None:
        self._endpoint = endpoint
        self._deadline_s = deadline_s
        self._ahead = bytearray(_BUFFER_NBYTES)
        self._view = memoryview(self._ahead)
        self._start = self._end = 0
        self._socket = self._guarded(self._connect)
        commands: list[list[bytes]] = []
        if endpoint.password:
            commands.append([b"AUTH", *([endpoint.user.encode()] if endpoint.user else []), endpoint.password.encode()])
        if endpoint.database:
            commands.append([b"SELECT", str(endpoint.database).encode()])
        try:
            self.send(commands, deadline_s)
            for command in commands:
                answer = self.read_line()
                if isinstance(answer, Refusal):
                    raise StoreIOError(f"{endpoint}: {command[0].decode()} was refused: {answer.text}")
        except StoreIOError:
            self._socket.close()
            raise

    def send(self, commands: Sequence[Sequence[bytes | memoryview]], deadline_s: float) -> None:
        """Send commands in one go; as many answers must be read after that.

        Args:
            commands: words of each; long ones are sent from where they lie.
            deadline_s: when to give up this and the reading that follows.
        """
        self._deadline_s = deadline_s
        pieces: list[bytes | memoryview] = []
        text = bytearray()
        for words in commands:
            text += b"*%d\r\n" % len(words)
            for word in words:
                text += b"$%d\r\n" % len(word)
                if isinstance(word, memoryview):
                    pieces += (bytes(text), word)
                    text.clear()
                else:
                    text += word
                text += b"\r\n"
        pieces.append(bytes(text))
        self._guarded(lambda: self._send(pieces))

    def read_line(self) -> int | str | Refusal:
        """Read an answer that is a number, a status or an error."""
        kind, line = self._header()
        if kind == b":":
            return self._number(line)
        if kind in (b"+", b"-"):
            text = line.decode(errors="replace")
            return text if kind == b"+" else Refusal(text)
        raise self._broken(f"an answer of type {kind!r}")

    def read_value(self, room: memoryview) -> int | Refusal | None:
        """Read an answer that is a value, into `room`.

        Returns:
            Its length, None when there is no value, -1 when it is longer than `room`: the connection must be closed
            then, since the value was not read.
        """
        kind, line = self._header()
        if kind == b"-":
            return Refusal(line.decode(errors="replace"))
        if kind != b"$":
            raise self._broken(f"an answer of type {kind!r} where a value was expected")
        nbytes = self._number(line)
        if nbytes == -1:
            return None
        if nbytes < 0:
            raise self._broken(f"a value of {nbytes} bytes")
        if nbytes > len(room):
            return -1
        self._fill(room[:nbytes])
        if self._line():
            raise self._broken("a value longer than announced")
        return nbytes

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def _connect(self) -> socket.socket:
        if self._endpoint.path:
            plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                plain.settimeout(self._left_s())
                plain.connect(self._endpoint.path)
            except BaseException:
                plain.close()
                raise
            return plain
        plain = socket.create_connection((self._endpoint.host, self._endpoint.port), self._left_s())
        try:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if not self._endpoint.is_tls:
                return plain
            plain.settimeout(self._left_s())
            return ssl.create_default_context().wrap_socket(plain, server_hostname=self._endpoint.host)
        except BaseException:
            plain.close()
            raise

    def _send(self, pieces: Sequence[bytes | memoryview]) -> None:
        left = [memoryview(piece) for piece in pieces]
        while left:
            self._socket.settimeout(self._left_s())
            if self._endpoint.is_tls:  # knows no sendmsg
                self._socket.sendall(left.pop(0))
                continue
            sent = self._socket.sendmsg(left[:_MAX_BUFFERS])
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if left:
                left[0] = left[0][sent:]

    def _header(self) -> tuple[bytes, bytes]:
        line = self._line()
        return line[:1], line[1:]

    def _line(self) -> bytes:
        """The next line, without its end; no line of the protocol is as long as the buffer."""
        while True:
            found = self._ahead.find(b"\r\n", self._start, self._end)
            if found >= 0:
                line = bytes(self._view[self._start : found])
                self._start = found + 2
                return line
            if self._start:
                kept = bytes(self._view[self._start : self._end])
                self._ahead[: len(kept)] = kept
                self._start, self._end = 0, len(kept)
            if self._end == len(self._ahead):
                raise self._broken("a line that does not end")
            self._end += self._receive(self._view[self._end :])

    def _fill(self, room: memoryview) -> None:
        ahead = min(len(room), self._end - self._start)
        room[:ahead] = self._view[self._start : self._start + ahead]
        self._start += ahead
        while ahead < len(room):
            ahead += self._receive(room[ahead:])

    def _receive(self, room: memoryview) -> int:
        def receive() -> int:
            self._socket.settimeout(self._left_s())
            return self._socket.recv_into(room)

        nbytes = self._guarded(receive)
        if nbytes == 0:
            raise StoreIOError(f"{self._endpoint}: the server hung up")
        return nbytes

    def _number(self, line: bytes) -> int:
        if not _NUMBER.fullmatch(line):
            raise self._broken(f"{line[:40]!r} where a number was expected")
        return int(line)

    def _left_s(self) -> float:
        """Seconds left; a peer that sends a byte now and then must not buy time with each."""
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("too slow")
        return left_s

    def _guarded(self, action: Callable[[], Result]) -> Result:
        try:
            return action()
        except (OSError, ValueError) as error:  # ValueError: an impossible host name
            raise StoreIOError(f"{self._endpoint}: {error}") from error

    def _broken(self, what: str) -> StoreIOError:
        return StoreIOError(f"{self._endpoint}: not RESP2: {what}")
