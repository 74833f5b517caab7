# SPDX-License-Identifier: Apache-2.0
# Types of the native module; what each name promises stands in kvstore/native.py and in the headers under csrc.

from collections.abc import Sequence
from os import PathLike
from typing import TypedDict, final

from typing_extensions import Buffer

from kvstore.errors import KVStoreError

class _BuildInfo(TypedDict):
    version: str
    has_cuda: bool
    cuda_devices: int
    simd: str

def crc32c(data: Buffer, seed: int = 0) -> int: ...
def crc32c_table(data: Buffer, seed: int = 0) -> int: ...
def build_info() -> _BuildInfo: ...

@final
class Geometry:
    def __init__(
        self, num_layers: int, kv_heads: int, key_dim: int, value_dim: int, itemsize: int, block_tokens: int
    ) -> None: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def key_dim(self) -> int: ...
    @property
    def value_dim(self) -> int: ...
    @property
    def itemsize(self) -> int: ...
    @property
    def block_tokens(self) -> int: ...
    @property
    def slot_nbytes(self) -> int: ...

def gather_rows(
    geometry: Geometry, plane: int, pool: Buffer, slots: Buffer, row_starts: Buffer, dense: Buffer
) -> None: ...
def scatter_rows(
    geometry: Geometry, plane: int, pool: Buffer, slots: Buffer, row_starts: Buffer, dense: Buffer
) -> None: ...

_Entry = tuple[int, int, int, int, int, int, int, int, int, int, int]

@final
class Calibration:
    def __init__(self, data: Buffer, id_bytes: Buffer) -> None: ...

@final
class RecordPart: ...

@final
class PlaneDirectory:
    def entries(self) -> list[_Entry]: ...
    def span(self, first: int, end: int) -> tuple[int, int]: ...
    def needs_calibration(self, first: int, end: int) -> bool: ...
    def part(self, first: int, end: int, data: Buffer, data_offset: int) -> RecordPart: ...

_Target = tuple[int, int, int, int, int]
_Request = tuple[Geometry, int, int, RecordPart, Calibration | None, list[_Target], tuple[int, int, list[int]]]

@final
class DecodePlan:
    def __init__(self, requests: list[_Request]) -> None: ...
    @property
    def workspace_nbytes(self) -> int: ...
    @property
    def zeroed_nbytes(self) -> int: ...
    def faults(self, zeroed: Buffer) -> list[str]: ...
    def run_in_lockstep(self) -> list[str]: ...
    def upload(self, workspace: tuple[int, int], stream: int) -> None: ...
    def launch(self, workspace: tuple[int, int], stream: int) -> None: ...

_EncodeRequest = tuple[
    Geometry,
    int,
    int,
    int,
    tuple[int, int, bool, bool],
    Calibration | None,
    int,
    list[_Target],
    tuple[int, int, list[int]],
]

@final
class EncodePlan:
    def __init__(self, requests: list[_EncodeRequest]) -> None: ...
    @property
    def workspace_nbytes(self) -> int: ...
    @property
    def results_nbytes(self) -> int: ...
    def run_in_lockstep(self) -> bytes: ...
    def launch(self, workspace: tuple[int, int], stream: int) -> None: ...
    def pieces(self, results: Buffer) -> list[list[tuple[int, int]]]: ...
    def assemble(self, request: int, results: Buffer, planes: Sequence[Buffer]) -> bytes: ...

@final
class ByteRows:
    def __init__(self, codes: Buffer, low: Buffer, step: Buffer, partitions: int, rows: int, width: int) -> None: ...

def encode_byte_rows(
    rows: Buffer, codes: Buffer, low: Buffer, step: Buffer, partitions: int, num_rows: int, width: int
) -> None: ...
def score_byte_rows(jobs: Sequence[tuple[Sequence[ByteRows], Buffer, Buffer, int, int]], num_threads: int) -> None: ...
def choose_units(
    views: Sequence[tuple[Buffer, float, float]],
    table: Sequence[Buffer],
    budget_tokens: int,
    num_lists: int,
    out: Sequence[Buffer],
) -> bool: ...

class UnitRows:
    def __init__(
        self,
        views: Sequence[tuple[Sequence[ByteRows], Sequence[tuple[Buffer, int]], bool, bool, float, float]],
        table: Sequence[Buffer],
    ) -> None: ...
    def choose(
        self,
        queries: Buffer,
        factors: Buffer,
        shape: tuple[int, int, int],
        budget_tokens: int,
        num_lists: int,
        num_threads: int,
        out: Sequence[Buffer],
    ) -> bool: ...

def score_postings(
    postings: Buffer, sizes: Buffer, words: tuple[Buffer, Buffer, Buffer, Buffer], num_tokens: int, totals: Buffer
) -> None: ...
def limit_simd(level: str) -> None: ...
def probe_record(
    record: Buffer,
) -> tuple[tuple[int, int], int, int, int, int, int, int, int, int, int, bytes, int, int, PlaneDirectory]: ...
def record_bound(geometry: Geometry, dtype: int, num_tokens: int) -> int: ...
def split_planes(geometry: Geometry, dtype: int, num_tokens: int, slot: Buffer, streams: Buffer) -> None: ...
def encode_record(
    geometry: Geometry,
    dtype: int,
    num_tokens: int,
    profile: int,
    steps: tuple[int, int, bool, bool],
    calibration: Calibration | None,
    first_token: int,
    slot: Buffer,
    is_split: Sequence[bool],
    streams: Sequence[Buffer],
    out: Buffer,
) -> int: ...
def pack_extents(
    geometry: Geometry,
    dtype: int,
    profile: int,
    steps: tuple[int, int, bool, bool],
    calibration: Calibration | None,
    blocks: Sequence[tuple[Buffer, int, int, bytes, int]],
    out: Buffer,
) -> list[tuple[int, bytes]]: ...
def seal_extent(key: bytes, generation: int, record_nbytes: int, room: Buffer) -> int: ...
def open_planes(geometry: Geometry, dtype: int, num_tokens: int, part: RecordPart) -> list[tuple[int, int]]: ...
def decode_extents(
    geometry: Geometry,
    dtype: int,
    has_lossy: bool,
    calibrations: Sequence[Calibration],
    memory: Buffer,
    extents: Sequence[tuple[int, int, bytes, int, int, int, int]],
) -> list[int]: ...
def copy_memory(copies: Sequence[tuple[int, int, int]]) -> None: ...
def decode_planes(
    geometry: Geometry,
    dtype: int,
    num_tokens: int,
    part: RecordPart,
    streams: Sequence[Buffer],
    calibration: Calibration | None,
    slot: Buffer,
) -> None: ...
def decode_rows(
    geometry: Geometry,
    dtype: int,
    num_tokens: int,
    part: RecordPart,
    streams: Sequence[Buffer],
    calibration: Calibration | None,
    wanted: tuple[int, int, int, int],
    keys: Buffer,
    values: Buffer,
) -> None: ...

@final
class DirectFile:
    def __init__(self, path: str | bytes | PathLike[str], writable: bool) -> None: ...
    @property
    def is_direct(self) -> bool: ...
    def size(self) -> int: ...
    def preallocate(self, nbytes: int) -> None: ...
    def sync(self) -> None: ...
    def drop_cache(self) -> None: ...
    def close(self) -> None: ...

@final
class Ticket:
    def done(self) -> bool: ...
    def wait(self, timeout_s: float | None = None) -> bool: ...
    def wait_some(self, may_wait: bool = True) -> list[int]: ...
    def errors(self) -> dict[int, KVStoreError]: ...
    def cancel(self) -> None: ...

@final
class IoPool:
    def __init__(self, num_threads: int, engine: str | None = None, depth: int = 64) -> None: ...
    @property
    def engine(self) -> str: ...
    def submit_read(self, file: DirectFile, buffer: Buffer, ops: Sequence[tuple[int, int, int]]) -> Ticket: ...
    def submit_write(self, file: DirectFile, buffer: Buffer, ops: Sequence[tuple[int, int, int]]) -> Ticket: ...
    def read(self, file: DirectFile, buffer: Buffer, ops: Sequence[tuple[int, int, int]]) -> None: ...
    def write(self, file: DirectFile, buffer: Buffer, ops: Sequence[tuple[int, int, int]]) -> None: ...
    def close(self) -> None: ...

@final
class Arena(Buffer):
    def __init__(self, nbytes: int, pinned: bool) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def is_pinned(self) -> bool: ...

def copy_to_device(
    host: Buffer, device: tuple[int, int], runs: Sequence[tuple[int, int, int]], by_kernel: bool, stream: int
) -> None: ...
def copy_to_host(
    device: tuple[int, int], host: Buffer, runs: Sequence[tuple[int, int, int]], by_kernel: bool, stream: int
) -> None: ...
def device_gather_rows(
    geometry: Geometry,
    plane: int,
    pool: tuple[int, int],
    slots: tuple[int, int],
    row_starts: tuple[int, int],
    dense: tuple[int, int],
    status: int,
    stream: int,
) -> None: ...
def device_scatter_rows(
    geometry: Geometry,
    plane: int,
    pool: tuple[int, int],
    slots: tuple[int, int],
    row_starts: tuple[int, int],
    dense: tuple[int, int],
    status: int,
    stream: int,
) -> None: ...
