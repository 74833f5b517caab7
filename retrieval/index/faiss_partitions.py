# SPDX-License-Identifier: Apache-2.0
"""Partitions searched by FAISS: flat or inverted lists, on the CPU or a GPU, growing while they are searched."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from kvstore.errors import ConfigError
from kvstore.extras import missing_dependency
from kvstore.retrieval.index.faiss_index import is_faiss_installed
from kvstore.retrieval.index.partitions import check_finite, check_partitions, rows_below
from kvstore.retrieval.index.segment import SEGMENT_ROWS

IVF_ROWS = 1 << 17
"""Rows of a group from which lists are worth their loss: below, FAISS reads all rows of a partition within 2 ms."""

_TRAINING_ROWS = 39
"""Rows per list, below which FAISS says that lists are learnt of too few."""

_GPU_TEMPORARY_NBYTES = 64 << 20


class FaissRows(StrEnum):
    """How FAISS keeps rows: exactly, as float16, or as a byte per element with one range per channel."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BYTES = "bytes"


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows that never change again: one FAISS index per partition; `searched` are copies on the GPU if that is used."""

    num_rows: int
    kept: tuple[Any, ...]
    searched: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _State:
    groups: tuple[_Group, ...]
    tail: Tensor
    tail_rows: int

    @property
    def num_rows(self) -> int:
        return sum(group.num_rows for group in self.groups) + self.tail_rows


class FaissPartitions:
    """Inner-product search by FAISS, which has neither an index of several partitions nor one that may grow in use.

    Rows are gathered in a tail; a full tail becomes a group, and two groups of one size become one of twice the size,
    so there are few groups, and each row is coded anew as often as the index doubles. Searches read the last state that
    was published and take no lock, but on a GPU, where FAISS' searches exclude one another. Removes nothing.

    Args:
        num_partitions: one per KV head.
        width: elements of a row.
        rows: how they are kept. For bytes, the ranges are learnt of the first full tail.
        ivf_rows: from so many rows on a group is split into inverted lists.
        probed_share: of its lists that are searched.
        uses_gpu: search copies on the first GPU, float16 unless rows are float32.

    Raises:
        MissingDependencyError: FAISS is not installed.
        ConfigError: a GPU is wanted, and this FAISS has none.
    """

    def __init__(
        self,
        num_partitions: int,
        width: int,
        rows: FaissRows = FaissRows.FLOAT16,
        *,
        ivf_rows: int = IVF_ROWS,
        probed_share: float = 0.25,
        uses_gpu: bool = False,
    ) -> None:
        if not is_faiss_installed():
            raise missing_dependency("faiss", "the FAISS index")
        import faiss  # imported here: loading it costs 100 ms and a second OpenMP runtime

        self._faiss = faiss
        self._rows = rows
        self._ivf_rows = ivf_rows
        self._probed_share = probed_share
        self._resources = self._gpu_resources() if uses_gpu else None
        self._writing = threading.Lock()
        self._on_gpu = threading.Lock()
        self._templates: tuple[Any, ...] = ()
        self._state = _State((), torch.empty(num_partitions, SEGMENT_ROWS, width), 0)

    @property
    def num_rows(self) -> int:
        """See `PartitionedIndex`."""
        return self._state.num_rows

    def add(self, rows: Tensor) -> None:
        """See `PartitionedIndex`."""
        check_partitions(rows, self._state.tail.shape[0], self._state.tail.shape[2])
        check_finite(rows)
        with self._writing:
            for part in self._cut(rows):
                now = self._state
                needed = now.tail_rows + part.shape[1]
                now.tail[:, now.tail_rows : needed] = part  # beyond what readers see
                self._state = replace(now, tail_rows=needed)
                if needed == SEGMENT_ROWS:
                    groups = (*now.groups, self._group(now.tail))
                    while len(groups) > 1 and groups[-2].num_rows == groups[-1].num_rows:
                        groups = (*groups[:-2], self._group(torch.cat([_decoded(each) for each in groups[-2:]], dim=1)))
                    self._state = _State(groups, torch.empty_like(now.tail), 0)

    def scores(self, queries: Tensor, end: int | None = None) -> Tensor:
        """See `PartitionedIndex`; slow: FAISS finds the best rows, so all rows are decoded for this."""
        now = self._state
        check_partitions(queries, now.tail.shape[0], now.tail.shape[2])
        rows = torch.cat([*(_decoded(group) for group in now.groups), now.tail[:, : now.tail_rows]], dim=1)
        return torch.bmm(queries, rows[:, : rows_below(end, now.num_rows)].transpose(1, 2))

    def search(self, queries: Tensor, k: int, end: int | None = None) -> tuple[Tensor, Tensor]:
        """See `PartitionedIndex`.

        Where the inverted lists that were searched hold too few rows, places have score -inf and row -1.
        """
        now = self._state
        check_partitions(queries, now.tail.shape[0], now.tail.shape[2])
        end = rows_below(end, now.num_rows)
        scores, rows, first = [], [], 0
        for group in now.groups:
            if first < end:
                found = self._searched(group, queries, min(k, end - first, group.num_rows), end - first)
                scores.append(found[0])
                rows.append(torch.where(found[1] < 0, -1, found[1] + first))
            first += group.num_rows
        of_tail = torch.bmm(queries, now.tail[:, : max(end - first, 0)].transpose(1, 2))
        scores.append(of_tail)
        rows.append(torch.arange(first, first + of_tail.shape[2]).expand_as(of_tail))
        best = torch.cat(scores, dim=2).topk(min(k, end), dim=2)
        return best.values, torch.cat(rows, dim=2).gather(2, best.indices)

    def _cut(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Parts that fill the tail, then whole tails."""
        room = min(SEGMENT_ROWS - self._state.tail_rows, rows.shape[1])
        return tuple(part for part in (rows[:, :room], *rows[:, room:].split(SEGMENT_ROWS, dim=1)) if part.shape[1])

    def _searched(self, group: _Group, queries: Tensor, k: int, end: int) -> tuple[Tensor, Tensor]:
        is_whole = end >= group.num_rows
        options: dict[str, Any] = {}
        if not is_whole:  # only the group in which the range ends pays for a selector, which keeps FAISS to slow loops
            options["sel"] = self._faiss.IDSelectorRange(0, end)
        found = []
        for index, asked in zip(group.searched if is_whole else group.kept, queries, strict=True):
            parameters: Any = None
            if group.num_rows >= self._ivf_rows:
                options["nprobe"] = max(1, int(self._probed_share * index.nlist))
                parameters = self._faiss.SearchParametersIVF(**options)
            elif options:
                parameters = self._faiss.SearchParameters(**options)
            if self._resources is None or not is_whole:
                found.append(index.search(asked.contiguous().numpy(), k, params=parameters))
            else:
                with self._on_gpu:
                    found.append(index.search(asked.contiguous().numpy(), k, params=parameters))
        scores, rows = (torch.stack([torch.from_numpy(each[part]) for each in found]) for part in (0, 1))
        return scores.masked_fill_(rows < 0, float("-inf")), rows

    def _group(self, rows: Tensor) -> _Group:
        if not self._templates:
            self._templates = tuple(self._trained(part) for part in rows)
        kept = []
        for template, part in zip(self._templates, rows, strict=True):
            is_split = rows.shape[1] >= self._ivf_rows
            index = self._lists(part) if is_split else self._faiss.clone_index(template)
            index.add(part.contiguous().numpy())
            kept.append(index)
        searched = tuple(kept)
        if self._resources is not None:
            options = self._faiss.GpuClonerOptions()
            options.useFloat16 = self._rows is not FaissRows.FLOAT32
            searched = tuple(
                self._faiss.index_cpu_to_gpu(self._resources, 0, self._flat(index), options) for index in kept
            )
        return _Group(rows.shape[1], tuple(kept), searched)

    def _trained(self, rows: Tensor) -> Any:
        if self._rows is FaissRows.FLOAT32:
            return self._faiss.IndexFlatIP(rows.shape[1])
        index = self._faiss.IndexScalarQuantizer(rows.shape[1], self._quantizer(), self._faiss.METRIC_INNER_PRODUCT)
        index.train(rows.contiguous().numpy())
        return index

    def _lists(self, rows: Tensor) -> Any:
        width = rows.shape[1]
        nlist = min(int(4 * rows.shape[0] ** 0.5), max(1, rows.shape[0] // _TRAINING_ROWS))
        index: Any
        coarse = self._faiss.IndexFlatIP(width)
        if self._rows is FaissRows.FLOAT32:
            index = self._faiss.IndexIVFFlat(coarse, width, nlist, self._faiss.METRIC_INNER_PRODUCT)
        else:
            metric = self._faiss.METRIC_INNER_PRODUCT
            index = self._faiss.IndexIVFScalarQuantizer(coarse, width, nlist, self._quantizer(), metric, False)
        index.cp.niter = 8
        index.train(rows.contiguous().numpy())
        index.make_direct_map()
        return index

    def _quantizer(self) -> Any:
        kinds = self._faiss.ScalarQuantizer
        return kinds.QT_fp16 if self._rows is FaissRows.FLOAT16 else kinds.QT_8bit

    def _flat(self, index: Any) -> Any:
        """A GPU has no scalar quantizer without lists: it gets the rows themselves."""
        if index.ntotal >= self._ivf_rows:
            return index
        flat = self._faiss.IndexFlatIP(index.d)
        flat.add(index.reconstruct_n(0, index.ntotal))
        return flat

    def _gpu_resources(self) -> Any:
        if not hasattr(self._faiss, "StandardGpuResources") or not self._faiss.get_num_gpus():
            raise ConfigError("FAISS is to search on a GPU: it needs faiss-gpu, and a GPU that it can use")
        resources = self._faiss.StandardGpuResources()
        resources.setTempMemory(_GPU_TEMPORARY_NBYTES)
        return resources


def _decoded(group: _Group) -> Tensor:
    return torch.stack([torch.from_numpy(index.reconstruct_n(0, group.num_rows)) for index in group.kept])
