"""What those who listen to vLLM's KV events (`--kv-events-config`), routers mostly, are told of the store.

    BlockStored, STORAGE     pages that the store took, or gave back
    BlockRemoved, STORAGE    a page of which this was said and that was not found; the oldest, when more than `MOST` are
                             told; all of them, when they are of weights that were replaced, or were cleared

A block here is a page of the store, named by the store's page hash in the form that vLLM gives its own: a listener who goes by `token_ids` and
`parent_block_hash` needs no more. Another process may evict a page, and nobody is told before this engine asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from .jobs import Job

MOST = 1 << 19  # pages, as many as SGLang's side remembers
OWNER = "lmcache"


class StoreEvents:
    """Args: wanted: whether anybody publishes. most: pages that listeners believe to be stored."""

    def __init__(self, *, wanted: bool, most: int = MOST) -> None:
        self._wanted = wanted
        self._most = most
        self._told: dict[bytes, None] = {}  # oldest first
        self._waiting: list[Any] = []

    def take(self) -> list[Any]:
        waiting, self._waiting = self._waiting, []
        return waiting

    def stored(self, job: Job, request: Request) -> None:
        """The pages of a job are in the store."""
        new = [at for at, page in enumerate(job.hashes) if page not in self._told]
        if not self._wanted or not new:
            return
        for first, end in _runs(new):
            self._tell(job, request, first, end)
        while len(self._told) > self._most:
            self._remove([next(iter(self._told))])

    def found(self, hashes: Sequence[bytes], pages: int) -> None:
        """A lookup found so many of a chain's first pages."""
        if pages < len(hashes) and hashes[pages] in self._told:
            self._remove([hashes[pages]])

    def cleared(self) -> None:
        """No page that was told of is of any use."""
        if self._told:
            self._remove(list(self._told))

    def _tell(self, job: Job, request: Request, first: int, end: int) -> None:
        from vllm.distributed.kv_events import MEDIUM_STORAGE, BlockStored
        from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash as named

        hashes = list(job.hashes[first:end])
        start = (job.tokens[0] // job.page_size + first) * job.page_size
        before = job.hashes[first - 1] if first else b"" if job.is_first else job.before
        adapter, salt = request.lora_request, request.cache_salt
        keys = tuple(each for each in (adapter.lora_name if adapter else None, salt) if each)
        self._told |= dict.fromkeys(hashes)
        self._waiting.append(
            BlockStored(
                block_hashes=[named(each) for each in hashes],
                parent_block_hash=named(before) if before else None,
                token_ids=list(request.all_token_ids[start : start + len(hashes) * job.page_size]),
                block_size=job.page_size,
                lora_id=adapter.adapter_id if adapter else None,
                medium=MEDIUM_STORAGE,
                lora_name=adapter.lora_name if adapter else None,
                extra_keys=[keys or None] * len(hashes),
                ownership=OWNER,
            )
        )

    def _remove(self, hashes: list[bytes]) -> None:
        from vllm.distributed.kv_events import MEDIUM_STORAGE, BlockRemoved
        from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash as named

        for page in hashes:
            del self._told[page]
        self._waiting.append(
            BlockRemoved(
                block_hashes=[named(each) for each in hashes],
                medium=MEDIUM_STORAGE,
                ownership=OWNER,
            )
        )


def _runs(places: Sequence[int]) -> list[tuple[int, int]]:
    """First, and one past the last, of those that follow one another."""
    runs: list[tuple[int, int]] = []
    for place in places:
        if runs and runs[-1][1] == place:
            runs[-1] = runs[-1][0], place + 1
        else:
            runs.append((place, place + 1))
    return runs
