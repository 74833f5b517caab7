# SPDX-License-Identifier: Apache-2.0
"""Records decoded where attention reads them: one warp a segment, straight into rows or pages on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvstore.codec import Codec
from kvstore.errors import ConfigError, CorruptRecordError, ShapeError
from kvstore.layout import TORCH_DTYPE
from kvstore.native import DecodePlan
from kvstore.record import RecordInfo

if TYPE_CHECKING:
    from typing_extensions import Buffer


@dataclass(frozen=True, slots=True)
class Pages:
    """Which pages of a paged cache take a block's rows.

    Args:
        page_tokens: rows of a page.
        slots: the block's pages, in the order of its tokens.
        first_row: where in the first page its first token goes.
    """

    page_tokens: int
    slots: Sequence[int]
    first_row: int = 0


@dataclass(frozen=True, slots=True)
class DeviceRecord:
    """A run of layers of one record, and where all of its tokens go.

    Args:
        codec: of the record's layout, with the calibration it was written with.
        info: the record's header.
        data: bytes of the record from `data_offset` on; unchanged until the decode has been waited for. Page-locked
            memory is copied without the host waiting.
        data_offset: position of `data` in the record.
        layers: consecutive layers, at least one.
        keys: one tensor a layer, [kv_heads, num_tokens, key_dim], or [pages, kv_heads, page_tokens, key_dim] with
            `pages`: any strides but contiguous in the last, so that a permuted view says how the engine lays out its
            cache. [layers, ...] in one tensor does as well.
        values: likewise.
        pages: for paged targets.
    """

    codec: Codec
    info: RecordInfo
    data: Buffer
    data_offset: int
    layers: range
    keys: Sequence[Tensor] | Tensor
    values: Sequence[Tensor] | Tensor
    pages: Pages | None = None


class DeviceDecode:
    """A decode under way; what it reads and writes is kept until it has been waited for."""

    def __init__(self, plan: DecodePlan, records: Sequence[DeviceRecord], stream: torch.cuda.Stream) -> None:
        self._plan, self._kept, self._stream = plan, tuple(records), stream
        with torch.cuda.stream(stream):
            self._workspace = torch.empty(plan.workspace_nbytes, dtype=torch.uint8, device=stream.device)
            workspace = self._workspace.data_ptr(), self._workspace.nbytes
            plan.upload(workspace, stream.cuda_stream)
            plan.launch(workspace, stream.cuda_stream)

    def wait(self) -> list[CorruptRecordError | None]:
        """Wait for the stream; see `decode_on_device`."""
        with torch.cuda.stream(self._stream):
            zeroed = self._workspace[: self._plan.zeroed_nbytes].cpu()
        return _errors(self._plan.faults(zeroed.numpy().data))


def start_decode(records: Sequence[DeviceRecord], stream: torch.cuda.Stream) -> DeviceDecode:
    """Check records on the host and queue their decoding on `stream`; see `decode_on_device`."""
    plan, device = plan_decode(records)
    if device != stream.device:
        raise ShapeError(f"targets are on {device}, the stream is of {stream.device}")
    return DeviceDecode(plan, records, stream)


def decode_on_device(
    records: Sequence[DeviceRecord], stream: torch.cuda.Stream | None = None
) -> list[CorruptRecordError | None]:
    """Decode records into tensors, byte for byte as `Codec.decode_rows` does.

    Checksums of all planes are verified on the host first, and nothing of a record that fails is written. A segment
    that turns out to be corrupt on the way is reported too; its record's rows are unspecified then. No record
    affects another.

    Targets on the CPU are written by the same code, whose 32 lanes then take turns: slow, for comparing.

    Args:
        records: on one device.
        stream: any but the default one; the targets are ready when it has passed. None on the CPU only.

    Returns:
        What is wrong with each record; None where nothing is.

    Raises:
        ShapeError: an argument does not fit.
        SpecMismatchError: see `Codec.decode`.
        ConfigError: a plane is compressed with zstd or coded in a basis, which only the host can undo; or this build
            has no CUDA.
        StoreIOError: the device refused.
    """
    if not records:
        return []
    plan, device = plan_decode(records)
    if device.type == "cpu":
        return _errors(plan.run_in_lockstep())
    if stream is None:
        raise ConfigError(f"decoding on {device} needs a stream of yours")
    return start_decode(records, stream).wait()


def _errors(faults: list[str]) -> list[CorruptRecordError | None]:
    return [CorruptRecordError(fault) if fault else None for fault in faults]


def plan_decode(records: Sequence[DeviceRecord]) -> tuple[DecodePlan, torch.device]:
    """Check records on the host; returns what to run, and the device of the targets. See `decode_on_device`."""
    devices = {tensor.device for record in records for tensor in (*record.keys, *record.values)}
    if len(devices) != 1:
        raise ShapeError(f"targets of one batch are on one device; got {sorted(map(str, devices))}")
    requests = []
    for record in records:
        geometry, dtype, num_tokens, part, calibration = record.codec.part(
            record.info, record.data, record.data_offset, record.layers
        )
        info, pages = record.info, record.pages
        paging = paging_of(pages)
        if not len(record.keys) == len(record.values) == len(record.layers):
            raise ShapeError(f"{len(record.keys)} keys and {len(record.values)} values for layers {record.layers}")
        targets = [
            place_of(rows, (info.kv_heads, info.num_tokens, dim), info.dtype, pages)
            for layer in zip(record.keys, record.values, strict=True)
            for rows, dim in zip(layer, (info.key_dim, info.value_dim), strict=True)
        ]
        requests.append((geometry, dtype, num_tokens, part, calibration, targets, paging))
    return DecodePlan(requests), devices.pop()


def place_of(
    rows: Tensor, shape: tuple[int, int, int], dtype: str, pages: Pages | None
) -> tuple[int, int, int, int, int]:
    """Address, strides in bytes, and the number of pages of one layer's K or V.

    Args:
        rows: [kv_heads, num_tokens, dim], or [pages, kv_heads, page_tokens, dim].
        shape: the first of these.
        dtype: of the elements.
        pages: for the second of these.

    Raises:
        ShapeError: `rows` are of another shape or dtype, or not contiguous in the last.
    """
    heads, _, dim = shape
    wanted = shape if pages is None else (rows.shape[0], heads, pages.page_tokens, dim)
    if rows.shape != wanted or rows.dtype != TORCH_DTYPE[dtype] or (dim > 1 and rows.stride(-1) != 1):
        raise ShapeError(
            f"rows are {list(wanted)} {dtype}, contiguous in the last; got {list(rows.shape)} {rows.dtype} of strides "
            f"{rows.stride()}"
        )
    *page, head, row, _ = (stride * rows.itemsize for stride in rows.stride())
    return rows.data_ptr(), head, row, page[0] if page else 0, rows.shape[0] if page else 0


def paging_of(pages: Pages | None) -> tuple[int, int, list[int]]:
    """What the native plans take.

    Raises:
        ShapeError: there is no page.
    """
    if pages is None:
        return 0, 0, []
    if not pages.slots:
        raise ShapeError("paged rows need at least one page")
    return pages.page_tokens, pages.first_row, list(pages.slots)
