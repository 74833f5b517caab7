# SPDX-License-Identifier: Apache-2.0
"""Whether rows in host memory are attended to where they lie or moved to the device first."""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.errors import ConfigError


@dataclass(frozen=True, slots=True)
class HostRates:
    """What a machine was measured to do.

    Args:
        host_nbytes_s: bytes of keys and values a second that attention on the CPU gets through, beside its products.
        host_flops_s: floating point operations a second of its products.
        link_nbytes_s: bytes a second from host memory to the device; None where there is no other device.
        link_wait_s: what a crossing costs beside its bytes.

    Raises:
        ConfigError: a rate is not positive, or the wait negative.
    """

    host_nbytes_s: float
    host_flops_s: float
    link_nbytes_s: float | None
    link_wait_s: float = 0.0

    def __post_init__(self) -> None:
        rates = (self.host_nbytes_s, self.host_flops_s, 1.0 if self.link_nbytes_s is None else self.link_nbytes_s)
        if not all(rate > 0 for rate in rates) or not self.link_wait_s >= 0:
            raise ConfigError(f"{self}: rates are positive, a wait is not negative")


@dataclass(frozen=True, slots=True)
class HostWork:
    """A selection of one layer that lies in host memory, and who attends to it.

    Args:
        num_rows: rows for each KV head.
        kv_heads: of the model.
        num_asking: query vectors of a forward: sequences by heads by new tokens.
        key_dim: elements of a key.
        value_dim: elements of a value.
        itemsize: bytes of an element.
        num_forwards: how many are expected to attend to it before another is chosen; what was moved stays for them.
    """

    num_rows: int
    kv_heads: int
    num_asking: int
    key_dim: int
    value_dim: int
    itemsize: int
    num_forwards: float = 1.0

    @property
    def nbytes(self) -> int:
        """Bytes of its keys and values."""
        return self.num_rows * self.kv_heads * (self.key_dim + self.value_dim) * self.itemsize

    @property
    def flops(self) -> int:
        """Floating point operations of one forward's products."""
        return 2 * self.num_rows * self.num_asking * (self.key_dim + self.value_dim)


def host_seconds(work: HostWork, rates: HostRates) -> float:
    """Expected time to attend on the CPU, in all forwards: the query over, the CPU's work, the result back.

    Bytes and products add up, as the CPU turns and widens rows first and multiplies them then.
    """
    once = work.nbytes / rates.host_nbytes_s + work.flops / rates.host_flops_s
    return work.num_forwards * (2 * rates.link_wait_s + once)


def move_seconds(work: HostWork, rates: HostRates) -> float:
    """Expected time to move it to the device, once; attention there counts as free. inf without a device."""
    if rates.link_nbytes_s is None:
        return float("inf")
    return rates.link_wait_s + work.nbytes / rates.link_nbytes_s


def stays_on_host(work: HostWork, rates: HostRates) -> bool:
    """Whether to attend where it lies; without a device to move to, always."""
    return host_seconds(work, rates) <= move_seconds(work, rates)


def rates_of(
    few: tuple[HostWork, float], many: tuple[HostWork, float], link_nbytes_s: float | None, link_wait_s: float
) -> HostRates:
    """Solve for the CPU's rates from two timed calls of `kvstore.kernels.host_attention.attend_on_host`.

    Args:
        few: rows asked by few queries, and the seconds that one forward took.
        many: the same rows asked by many, and the seconds that one forward took.
        link_nbytes_s: see `HostRates`.
        link_wait_s: see `HostRates`.

    Raises:
        ConfigError: the times fit no positive rates, as those of few rows on a busy machine.
    """
    (less, short_s), (more, long_s) = few, many
    flops_s = (more.flops - less.flops) / (long_s - short_s) if long_s > short_s else 0.0
    rest_s = short_s - less.flops / flops_s if flops_s > 0 else 0.0
    if more.nbytes != less.nbytes or not rest_s > 0:
        raise ConfigError(f"{short_s} s for {less}, {long_s} s for {more}: no rates fit; time more rows, when quiet")
    return HostRates(less.nbytes / rest_s, flops_s, link_nbytes_s, link_wait_s)
