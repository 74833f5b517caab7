# SPDX-License-Identifier: Apache-2.0
"""Addresses of remote tiers: what is understood, what is refused, and that passwords are not repeated."""

from __future__ import annotations

import pytest

from kvstore.errors import ConfigError
from kvstore.remote.address import open_server
from kvstore.remote.envelope import MAX_NAMESPACE_SIGNS, Namespace
from tests.remote_servers import need_mooncake


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("redis://host/lectures", "redis://host:6379/lectures"),
        ("redis://host:7000/a.b-c_d", "redis://host:7000/a.b-c_d"),
        ("redis://user:secret@host/x?db=2", "redis://host:6379/x"),
        ("rediss://host/x", "rediss://host:6379/x"),
        ("redis://[::1]:7000/x", "redis://::1:7000/x"),
        ("redis+unix:///run/redis.sock?namespace=x", "redis+unix:///run/redis.sock/x"),
    ],
)
def test_addresses_name_server_and_namespace(address: str, place: str) -> None:
    with open_server(address) as server:
        assert server.place == place


def test_mooncake_has_settings() -> None:
    need_mooncake()
    with open_server("mooncake://master/x?replicas=2&host=10.0.0.7&protocol=tcp") as server:
        assert server.place == "mooncake://master:50051/x"
    with pytest.raises(ConfigError, match="protocol"):
        open_server("mooncake://master/x?protocol=smoke")
    with pytest.raises(ConfigError, match="replicas"):
        open_server("mooncake://master/x?replicas=many")


@pytest.mark.parametrize(
    "address",
    [
        "",
        "redis",
        "http://host/x",
        "redis://host",
        "redis://host/",
        "redis:///x",
        "redis://host/a/b",
        "redis://host/a b",
        "redis://host/a*",
        "redis://host/" + "a" * (MAX_NAMESPACE_SIGNS + 1),
        "redis://host:port/x",
        "redis://host:99999/x",
        "redis://host/x?db=-1",
        "redis://host/x?db=one",
        "redis://host/x?colour=red",
        "redis+unix://host/run/redis.sock?namespace=x",
        "redis+unix:///run/redis.sock",
        "mooncake:///x",
        "redis://[::1/x",
    ],
)
def test_other_addresses_are_refused_with_the_forms_that_work(address: str) -> None:
    with pytest.raises(ConfigError):
        open_server(address)


def test_a_refusal_does_not_repeat_the_password() -> None:
    with pytest.raises(ConfigError) as caught:
        open_server("redis://user:pass@word@host/x?colour=red")
    assert "pass" not in str(caught.value).split("write it like")[0]


def test_namespaces_differ_in_their_fingerprints() -> None:
    spaces = [Namespace("a"), Namespace("b"), Namespace("a", "ff"), Namespace("a", "fe")]
    assert len({space.fingerprint for space in spaces}) == 4
