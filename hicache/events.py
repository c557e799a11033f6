"""What those who listen to SGLang's KV events are told of the store.

SGLang publishes where its blocks are on the device and on the host (`--kv-events-config`), for routers. It
names two more media, `DISK` and `EXTERNAL`, and reports nothing of them, nor can a storage backend. So
the plug-in adds to what SGLang takes from its queue:

    BlockStored, DISK     pages that the store took, or gave back
    BlockRemoved, DISK    pages of which this was said, and which were not found, were cleared, or belong to
                          weights that were replaced; or the oldest, when more than `MOST` are told

Another process may evict a page, and nobody is told before this engine asks for it. A block's name in an
event is SGLang's page hash only where the request has no salt, adapter or other key of its own, and a
backup does not say whether it has: pages are told of whose chain is known to start without one.

One rank's tree, backend and queue are one process, so this is the process's, as weights.py is.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import islice
from threading import Lock
from typing import Any

MOST = 1 << 19  # blocks, as many as SGLang's own memory of what is stored


class StoreEvents:
    """Events that wait for SGLang to take them, and the blocks that listeners believe to be stored.

    Nothing is kept until SGLang asks for the first time, which it does before its first request and only
    where it publishes.
    """

    def __init__(self, most: int = MOST) -> None:
        self._lock = Lock()  # SGLang's storage threads report, its main thread takes
        self._most = most
        self._asked = False
        self._told: dict[int, None] = {}  # oldest first
        self._waiting: list[Any] = []

    def take(self, before: list[Any]) -> list[Any]:
        """SGLang's own events, and after them those of the store."""
        from sglang.srt.disaggregation.kv_events import AllBlocksCleared

        with self._lock:
            self._asked = True
            waiting, self._waiting = self._waiting, []
            if any(isinstance(event, AllBlocksCleared) for event in before):
                self._told = dict.fromkeys(_stored_in(waiting))  # listeners forget every medium
        return [*before, *waiting]

    @property
    def wanted(self) -> bool:
        """Whether anybody publishes; until then nothing need be worked out."""
        return self._asked

    def backed_up(
        self, hashes: Sequence[str], tokens: Sequence[int], page_size: int, before: Sequence[str]
    ) -> None:
        """Pages were stored. Args: before: the hashes of the pages before them, if SGLang passes them."""
        parent = before[-1] if before else None
        if self._asked and hashes and self._is_plain(hashes[0], tokens[:page_size], parent):
            self.stored(hashes, tokens, page_size, parent)

    def _is_plain(self, page_hash: str, tokens: Sequence[int], parent: str | None) -> bool:
        """Whether the chain starts without a salt or a key: by its first page, or by what was told."""
        from sglang.srt.mem_cache.utils import get_hash_str

        if parent is not None:
            return _block(parent) in self._told
        return bool(get_hash_str(tokens, None, len(tokens)) == [page_hash])

    def stored(
        self, hashes: Sequence[str], tokens: Sequence[int], page_size: int, parent: str | None
    ) -> None:
        """Pages of a plain chain are in the store.

        Args:
            tokens: at least those of the pages.
            parent: the hash of the page before them; None at the start of a chain.
        """
        if not self._asked or not hashes:
            return
        blocks = _blocks(hashes)
        before = None if parent is None else _block(parent)
        with self._lock:
            new = next((i for i, block in enumerate(blocks) if block not in self._told), None)
            if new is None:
                return
            event = _stored(blocks[new:], blocks[new - 1] if new else before, page_size)
            event.token_ids = list(tokens[new * page_size : len(blocks) * page_size])
            self._waiting.append(event)
            self._told |= dict.fromkeys(blocks[new:])
            self._forget(list(islice(self._told, max(0, len(self._told) - self._most))))

    def lost(self, hashes: Sequence[str]) -> None:
        """Pages are not in the store. Those of which nothing was told are nobody's concern."""
        if self._told:
            blocks = [block for block in _blocks(hashes) if block in self._told]
            with self._lock:
                self._forget([block for block in blocks if block in self._told])

    def cleared(self) -> None:
        """Nothing of what was told is in the store any more, or within this engine's reach."""
        with self._lock:
            told, self._told = self._told, {}
            self._remove(list(told))

    def _forget(self, blocks: list[int]) -> None:
        for block in blocks:
            del self._told[block]
        self._remove(blocks)

    def _remove(self, blocks: list[int]) -> None:
        from sglang.srt.disaggregation.kv_events import BlockRemoved, StorageMedium

        if blocks:
            self._waiting.append(BlockRemoved(block_hashes=blocks, medium=StorageMedium.DISK))


def _stored(blocks: list[int], parent: int | None, page_size: int) -> Any:
    """An event without its tokens."""
    from sglang.srt.disaggregation.kv_events import BlockStored, StorageMedium

    return BlockStored(
        block_hashes=blocks,
        parent_block_hash=parent,
        token_ids=[],
        block_size=page_size,
        lora_id=None,
        medium=StorageMedium.DISK,
    )


def _stored_in(events: Sequence[Any]) -> list[int]:
    """The blocks that these events leave stored."""
    blocks: dict[int, None] = {}
    for event in events:
        if hasattr(event, "token_ids"):
            blocks |= dict.fromkeys(event.block_hashes)
        else:
            for block in event.block_hashes:
                blocks.pop(block, None)
    return list(blocks)


def _blocks(page_hashes: Sequence[str]) -> list[int]:
    """Pages' names in events, as SGLang's `hash_str_to_int64`: the first 8 bytes, signed.

    At once, since it is the scheduler's thread that waits.
    """
    first = bytes.fromhex("".join([page_hash[:16] for page_hash in page_hashes]))
    return list(struct.unpack(f">{len(page_hashes)}q", first))


def _block(page_hash: str) -> int:
    return _blocks([page_hash])[0]


of_this_process = StoreEvents()
