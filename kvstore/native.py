# SPDX-License-Identifier: Apache-2.0
"""The names of the native module, and the only import of it: bytes, memory, files, threads, devices.

All calls that move bytes release the GIL. Errors are those of `kvstore.errors`: ShapeError for a buffer or range that
does not fit, ConfigError for a closed object or one inherited through fork(), StoreIOError (with errno) and
CapacityError from the system, CorruptRecordError and UnsupportedFormatError from records.

Records (kvstore.codec is their face):
    Calibration(data, id_bytes): a parsed calibration object, shared by all threads.
    PlaneDirectory: of a record that was probed. `span` and `part` of layers [first, end) include what earlier layers
        hold for them; `entries` are the fields of every plane, as kvstore.record.PlaneInfo names them.
    decode_extents(..., has_lossy, calibrations, memory, extents): whole blocks from extents in `memory` to slots; an
        extent is (offset, nbytes, key, generation, record_nbytes, num_tokens, address of the slot). Returns the numbers
        of those that it left alone: another block, damage, a coding that takes Python, another calibration.
    copy_memory(copies): a copy is (address from, address to, nbytes).
    decode_rows(..., wanted, keys, values): wanted is (first_head, num_heads, first_token, num_tokens); keys and values
        are [layers, heads, tokens, dim] of any strides, rows contiguous.
    DecodePlan(requests): records that warps decode, on a device or in lock step on the host; a request is (geometry,
        dtype, num_tokens, part, calibration, targets, paging). A target is (address, head stride, row stride, page
        stride, pages), in bytes, one a plane; paging is (page_tokens, first_row, slots), slots empty if not paged. What
        is wrong with each record, "" where nothing is, is returned, or left in the workspace for `faults`.
    EncodePlan(requests): blocks that warps encode; a request is (geometry, dtype, num_tokens, profile, steps,
        calibration, first_token, sources, paging), sources as targets above. `pieces` are (offset, nbytes) of a block's
        planes in the workspace, none where the host has to encode it; `assemble` makes a record of them.
    pack_extents(geometry, dtype, profile, steps, calibration, blocks, out): blocks to extents, one behind the other in
        `out`; a block is (slot, num_tokens, first_token, key, generation). Returns (record_nbytes, directory) of each.
    seal_extent(key, generation, record_nbytes, room): header before, zeros behind a record at byte 64 of `room`;
        returns bytes of the extent.
    limit_simd(level): keeps loops beyond `baseline`, `avx2` or `avx512` from being used, for comparing them.

Rows of an index (csrc/index/byte_rows.hpp):
    ByteRows(codes, low, step, partitions, rows, width): a segment of rows kept as bytes; holds the three buffers.
    encode_byte_rows(rows, codes, low, step, partitions, num_rows, width): the codes of float32 rows, and their ranges.
    score_byte_rows(jobs, num_threads): a job is (segments, queries, scores, num_queries, stride): float32 queries
        [partitions, num_queries, width], and float32 scores [partitions, num_queries, stride] to be written.
    choose_units(views, table, budget_tokens, num_lists, out) -> bool: units that a budget holds for each list, by the
        sum of standard scores (csrc/index/unit_choice.hpp); a view is (scores, weight, share of neighbours).
    UnitRows(views, table): rows of a layer's units, held, to be asked for each forward (csrc/index/unit_question.hpp);
        a view is (segments, [(float32 rows [heads, capacity, width], how many count)], is_bound, is_shared, weight,
        share of neighbours).
        choose(queries, factors, shape, budget_tokens, num_lists, num_threads, out) -> bool: like `choose_units`, by
        float32 queries [heads, group, dim], which is `shape`, and what rotates them, [views, 2, dim].
    score_postings(postings, sizes, words, num_tokens, totals): what blocks earn by the words in them
        (csrc/index/postings.hpp); words are (places, starts, tokens, gains), and float32 totals are written.

Memory and files:
    Arena(nbytes, pinned): page-aligned writable memory, zero-filled, `nbytes` rounded up to pages; a buffer of uint8.
        `pinned` page-locks it when a CUDA device is there. The memory lives as long as any view of it.
    DirectFile(path, writable): O_DIRECT where the file system offers it (`is_direct`), else buffered. A writable file
        is created when missing.
    IoPool(num_threads, engine, depth): `engine` says what moves the bytes: "io_uring", with up to `depth` transfers in
        flight, where the system offers it, else "threads", `num_threads` of them. Asking for one takes no other.
    IoPool.submit_read | submit_write(file, buffer, ops) -> Ticket: ops are (file_offset, buffer_offset, nbytes), in
        multiples of 4096, memory address included, while the file is direct. Reading past the end is an error.
    IoPool.read | write(file, buffer, ops): submits and waits; one short op is moved on the calling thread.
    Ticket.wait(timeout_s) -> bool: blocks, then raises the error of the first op that failed; False when time ran out.
        The buffer is held until the batch is done; a dropped ticket waits. An op that fails takes no other along.
    Ticket.wait_some(may_wait): blocks until ops have ended that were not returned before, well or badly; [] when all
        were, or when it may not wait.
    Ticket.errors(): the failed ops so far, by number. Ticket.cancel(): ends ops that have not begun, with ECANCELED.

Planes (K of layer l is plane 2l, V is 2l + 1):
    gather_rows | scatter_rows(geometry, plane, pool, slots, row_starts, dense): between slots of `pool` and dense rows
        [num_rows, kv_heads, dim]; block i is slot slots[i] and holds rows [row_starts[i], row_starts[i + 1]), int32.
    device_gather_rows | device_scatter_rows(...): the same on device memory, given as (address, nbytes), queued on
        `stream`. A bad table entry moves nothing and sets the int32 at address `status` to 1.
    copy_to_device(host, device, runs, by_kernel, stream), copy_to_host(device, host, runs, by_kernel, stream): runs are
        (host_offset, device_offset, nbytes); queued, neighbours joined; the caller keeps the host buffer alive until
        the stream has passed. By the copy engine, or by a kernel where the host buffer is pinned and all is in
        multiples of 16 bytes. `stream` is a handle as an integer and never 0, the default stream.
"""

from __future__ import annotations

from kvstore.errors import MissingDependencyError

try:
    from kvstore._native import (
        Arena,
        ByteRows,
        Calibration,
        DecodePlan,
        DirectFile,
        EncodePlan,
        Geometry,
        IoPool,
        PlaneDirectory,
        RecordPart,
        Ticket,
        UnitRows,
        build_info,
        choose_units,
        copy_memory,
        copy_to_device,
        copy_to_host,
        crc32c,
        crc32c_table,
        decode_extents,
        decode_planes,
        decode_rows,
        device_gather_rows,
        device_scatter_rows,
        encode_byte_rows,
        encode_record,
        gather_rows,
        limit_simd,
        open_planes,
        pack_extents,
        probe_record,
        record_bound,
        scatter_rows,
        score_byte_rows,
        score_postings,
        seal_extent,
        split_planes,
    )
except ImportError as error:
    raise MissingDependencyError(
        f"kvstore's native part is not built for this Python ({error}): run `python setup.py build_ext --inplace`"
    ) from error

__all__ = [
    "Arena",
    "ByteRows",
    "Calibration",
    "DecodePlan",
    "DirectFile",
    "EncodePlan",
    "Geometry",
    "IoPool",
    "PlaneDirectory",
    "RecordPart",
    "Ticket",
    "build_info",
    "UnitRows",
    "choose_units",
    "copy_memory",
    "copy_to_device",
    "copy_to_host",
    "crc32c",
    "crc32c_table",
    "decode_extents",
    "decode_planes",
    "decode_rows",
    "device_gather_rows",
    "device_scatter_rows",
    "encode_byte_rows",
    "encode_record",
    "gather_rows",
    "limit_simd",
    "open_planes",
    "pack_extents",
    "probe_record",
    "record_bound",
    "scatter_rows",
    "seal_extent",
    "score_byte_rows",
    "score_postings",
    "split_planes",
]
