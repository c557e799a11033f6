"""vLLM's OffloadingConnector with its tiers, on CPU: its own worker copies only between a GPU and the host.

`CpuTieringSpec` is vLLM's `TieringOffloadingSpec` with a worker that copies by torch, at once, on the engine's thread.
All else, so the primary tier in shared memory and the tiers below, is vLLM's own.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class CopyingWorker(OffloadingWorker):  # type: ignore[misc]  # vLLM is not typed here
    """Args: blocks: of the engine, in one chunk of the primary tier. region: that tier's memory."""

    def __init__(self, kv_caches: Any, blocks: int, region: SharedOffloadRegion) -> None:
        self._blocks = blocks
        self._region = region
        self._groups = kv_caches.group_data_refs
        self._device = [each.tensor for each in kv_caches.tensors]  # [blocks, bytes] each
        self._host = [  # [chunks, bytes] each
            region.create_next_worker_view(each.page_size_bytes * blocks)
            for each in kv_caches.tensors
        ]
        self._done: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, ((b, a) for a, b in self._pairs(src_spec, dst_spec)))

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, self._pairs(dst_spec, src_spec))

    def _copy(self, job_id: int, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> bool:
        """Args: pairs: what is written, and what is read."""
        begun, moved = time.monotonic(), 0
        for target, source in pairs:
            target.copy_(source)
            moved += source.nbytes
        self._done.append(TransferResult(job_id, True, moved, time.monotonic() - begun))
        return True

    def get_finished(self) -> list[TransferResult]:
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        """They ended when they were submitted."""

    def shutdown(self) -> None:
        self._device.clear()
        self._host.clear()
        self._region.cleanup()

    def _pairs(self, blocks: Any, chunks: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each block of a job in each tensor, and its place in the primary tier."""
        at_block = at_chunk = 0
        for group, (count, first) in enumerate(
            zip(blocks.group_sizes, blocks.block_indices, strict=True)
        ):
            skipped = first % self._blocks
            spanned = -(-(count + skipped) // self._blocks)
            ids = blocks.block_ids[at_block : at_block + count]
            slots = chunks.block_ids[at_chunk : at_chunk + spanned]
            for ref in self._groups[group]:
                yield from self._of_tensor(ref, ids, slots, skipped)
            at_block += count
            at_chunk += spanned

    def _of_tensor(
        self, ref: Any, ids: np.ndarray, slots: np.ndarray, skipped: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        device, host, size = (
            self._device[ref.tensor_idx],
            self._host[ref.tensor_idx],
            ref.page_size_bytes,
        )
        pitch = host.shape[1] // self._blocks
        for at, block in enumerate(ids, skipped):
            chunk, part = divmod(at, self._blocks)
            start = part * pitch
            yield device[int(block), :size], host[int(slots[chunk]), start : start + size]


class CpuTieringSpec(TieringOffloadingSpec):  # type: ignore[misc]  # as above
    def get_worker(self, kv_caches: Any) -> OffloadingWorker:
        if not self._worker:  # type: ignore[has-type]  # vLLM's own
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = CopyingWorker(kv_caches, self.blocks_per_chunk, region)
        return self._worker
