"""What the prefill engine has in its store, by what it publishes (`--kv-events-config`).

SGLang tells routers where its blocks are on the device (`GPU`); the store's plug-in adds which of them the store
has taken (`DISK`, whatever the tier). So nobody has to guess when an answer's pages can be fetched by others.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import struct
from collections.abc import Sequence
from typing import Annotated

import msgspec
import zmq
import zmq.asyncio
from msgspec import Meta

logger = logging.getLogger(__name__)

MOST = 1 << 20  # blocks remembered of each medium; the oldest are forgotten
DEVICE, STORE = "GPU", "DISK"


class BlockStored(msgspec.Struct, tag=True):
    block_hashes: list[int]
    block_size: Annotated[int, Meta(ge=1)]
    medium: str | None = None


class BlockRemoved(msgspec.Struct, tag=True):
    block_hashes: list[int]
    medium: str | None = None


class AllBlocksCleared(msgspec.Struct, tag=True):
    pass


class EventBatch(msgspec.Struct, array_like=True):
    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]


_decoder = msgspec.msgpack.Decoder(EventBatch)


class StoredPages:
    """Blocks by medium, and those who wait for some. Of one event loop."""

    def __init__(self) -> None:
        self.page_size = 0  # tokens; 0 until a block was told of
        self._told: dict[str, dict[int, None]] = {DEVICE: {}, STORE: {}}
        self._changed = asyncio.Condition()

    async def note(self, batch: bytes) -> None:
        """What was published. Raises: msgspec.DecodeError: it is none of SGLang's events."""
        for event in _decoder.decode(batch).events:
            self._note(event)
        async with self._changed:
            self._changed.notify_all()

    def _note(self, event: BlockStored | BlockRemoved | AllBlocksCleared) -> None:
        match event:
            case AllBlocksCleared():
                self.forget()
            case BlockStored(block_hashes=blocks, medium=str(medium)) if medium in self._told:
                self.page_size = event.block_size
                told = self._told[medium]
                told |= dict.fromkeys(blocks)
                while len(told) > MOST:
                    told.pop(next(iter(told)))
            case BlockRemoved(block_hashes=blocks, medium=str(medium)) if medium in self._told:
                for block in blocks:
                    self._told[medium].pop(block, None)
            case _:  # of another medium
                pass

    def forget(self) -> None:
        """Nothing that was told is believed any more."""
        for told in self._told.values():
            told.clear()

    async def wait(self, tokens: Sequence[int], cached: int, seconds: float) -> bool:
        """Whether the store was told to have all whole pages of a prompt, within so many seconds.

        Args:
            tokens: the prompt.
            cached: how many of its first tokens the engine did not compute for it. Their pages may have been stored
                before anybody listened, so they are waited for only where the device has them and the store not yet.
        """
        try:
            async with asyncio.timeout(seconds), self._changed:
                await self._changed.wait_for(lambda: self.page_size)
                blocks = block_names(tokens, self.page_size)
                old = blocks[: cached // self.page_size]
                await self._changed.wait_for(lambda: self._are_stored(old, blocks[len(old) :]))
        except TimeoutError:
            return False
        return True

    def _are_stored(self, old: Sequence[int], new: Sequence[int]) -> bool:
        on_device, stored = self._told[DEVICE], self._told[STORE]
        return all(block in stored for block in new) and all(
            block in stored or block not in on_device for block in old
        )


def block_names(tokens: Sequence[int], page_size: int) -> list[int]:
    """What SGLang calls the whole pages of a prompt in its events: the first 8 bytes of each page's chained hash."""
    names, digest = list[int](), b""
    for start in range(0, len(tokens) // page_size * page_size, page_size):
        page = struct.pack(f"<{page_size}I", *tokens[start : start + page_size])
        digest = hashlib.sha256(digest + page).digest()
        names.append(int.from_bytes(digest[:8], "big", signed=True))
    return names


async def follow(endpoint: str, pages: StoredPages) -> None:
    """Hear what an engine publishes, for ever. ZeroMQ connects again by itself when the engine was restarted."""
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.SUB)
    socket.connect(endpoint)
    socket.subscribe(b"")
    expected = 0
    try:
        while True:
            _, sequence, batch = await socket.recv_multipart()
            number = int.from_bytes(sequence, "big")
            if number != expected:  # some were lost, or the engine is another one
                pages.forget()
            expected = number + 1
            try:
                await pages.note(batch)
            except msgspec.DecodeError as error:
                logger.warning("%s publishes what are no events of SGLang's: %s", endpoint, error)
                pages.forget()
    finally:
        socket.close(linger=0)
        context.term()
