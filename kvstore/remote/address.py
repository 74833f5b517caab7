# SPDX-License-Identifier: Apache-2.0
"""Addresses of remote tiers: one URL names the server, the namespace, and what a server needs to know."""

from __future__ import annotations

from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from kvstore.errors import ConfigError
from kvstore.remote.mooncake import MooncakeCluster, MooncakeTransport
from kvstore.remote.redis import RedisTransport
from kvstore.remote.resp import Endpoint
from kvstore.remote.server import RemoteConfig, RemoteServer
from kvstore.remote.transport import Transport

_FORMS = (
    "redis://[user:password@]host[:port]/namespace[?db=1], rediss://... with TLS, "
    "redis+unix:///path/of/socket?namespace=name, "
    "mooncake://master[:port]/namespace[?replicas=1&host=own-address&protocol=tcp&devices=names]"
)


def open_server(address: str, config: RemoteConfig | None = None) -> RemoteServer:
    """Make the server that an address names; connects to nothing yet.

    Args:
        address: a URL: `redis://`, `rediss://`, `redis+unix://` or `mooncake://`; docs/remote.md has all forms.
        config: deadlines and thresholds.

    Raises:
        ConfigError: not such an address.
        MissingDependencyError: the package that it needs is not installed.
    """
    try:
        url = urlsplit(address)
        port = url.port
    except ValueError as error:
        raise _wrong(address, str(error)) from error
    query = dict(parse_qsl(url.query, keep_blank_values=True))
    if url.scheme in ("redis", "rediss"):
        transport: Transport = RedisTransport(_endpoint(address, url, port or 6379, query))
        namespace = unquote(url.path[1:])
    elif url.scheme == "redis+unix":
        namespace = query.pop("namespace", "")
        if url.netloc or not url.path:
            raise _wrong(address, "no path of a socket")
        transport = RedisTransport(Endpoint(path=unquote(url.path), database=_number(address, query, "db", 0, 1 << 16)))
    elif url.scheme == "mooncake":
        transport = MooncakeTransport(_cluster(address, url, port or 50051, query))
        namespace = unquote(url.path[1:])
    else:
        raise _wrong(address, f"scheme {url.scheme!r}")
    if query:
        raise _wrong(address, f"unknown setting {sorted(query)[0]!r}")
    return RemoteServer(transport, namespace, config)


def _endpoint(address: str, url: SplitResult, port: int, query: dict[str, str]) -> Endpoint:
    if not url.hostname:
        raise _wrong(address, "no host")
    return Endpoint(
        host=url.hostname,
        port=port,
        is_tls=url.scheme == "rediss",
        user=unquote(url.username or ""),
        password=unquote(url.password or ""),
        database=_number(address, query, "db", 0, 1 << 16),
    )


def _cluster(address: str, url: SplitResult, port: int, query: dict[str, str]) -> MooncakeCluster:
    if not url.hostname:
        raise _wrong(address, "no host of the master")
    return MooncakeCluster(
        host=url.hostname,
        port=port,
        local_host=query.pop("host", "127.0.0.1"),
        replicas=_number(address, query, "replicas", 1, 64) or 1,
        protocol=query.pop("protocol", "tcp"),
        devices=query.pop("devices", ""),
    )


def _number(address: str, query: dict[str, str], name: str, default: int, largest: int) -> int:
    word = query.pop(name, str(default))
    if not word.isascii() or not word.isdigit() or int(word) > largest:
        raise _wrong(address, f"{name} is {word!r}; a number from 0 to {largest} is wanted")
    return int(word)


def _wrong(address: str, what: str) -> ConfigError:
    return ConfigError(f"remote address {_without_password(address)!r}: {what}; write it like {_FORMS}")


def _without_password(address: str) -> str:
    head, at, tail = address.rpartition("@")
    return address if not at else f"{head.partition('://')[0]}://...@{tail}"
