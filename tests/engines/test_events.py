"""KV events of the store, as a router subscribes to them, and SGLang's counts of what the store moved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from lmcache_sglang.testing.engine import (
    PAGE_SIZE,
    Answer,
    Setup,
    ask,
    metrics,
    pages_in_memory,
    prompt,
    server,
    until,
    whole_pages,
)
from lmcache_sglang.testing.server import SGLangServer, free_port

FIRST = prompt(1)
POOL = ("--max-total-tokens", "1024", "--hicache-ratio", "2", "--enable-metrics")
QUIET_MILLISECONDS = 1000

Page = tuple[int | None, tuple[int, ...]]  # the block before it, and its tokens


class Listener:
    """What a router would know: the blocks of each medium, as the events say."""

    def __init__(self) -> None:
        self._port = free_port("127.0.0.1")
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
        self._socket.connect(f"tcp://127.0.0.1:{self._port}")
        self._socket.subscribe("")
        self.blocks: dict[str, set[int]] = {}  # by medium
        self._names: dict[str, dict[Page, int]] = {}  # by medium; never forgotten

    @property
    def config(self) -> str:
        settings = {"publisher": "zmq", "endpoint": f"tcp://*:{self._port}"}
        return msgspec.json.encode(settings).decode()

    def hear(self) -> None:
        """Everything that was published so far, and for a second after."""
        while self._socket.poll(QUIET_MILLISECONDS):
            _, _, batch = self._socket.recv_multipart()
            for event in msgspec.msgpack.decode(batch)[1]:
                self._note(event)

    def _note(self, event: dict[str, Any]) -> None:
        if event["type"] == "AllBlocksCleared":
            self.blocks = {}
            return
        known = self.blocks.setdefault(event["medium"], set())
        if event["type"] == "BlockStored":
            known |= set(event["block_hashes"])
            self._names.setdefault(event["medium"], {}).update(_pages(event))
        else:
            known -= set(event["block_hashes"])

    @property
    def on_disk(self) -> set[int]:
        return self.blocks.get("DISK", set())

    def names(self, medium: str, tokens: Sequence[int]) -> list[int]:
        """The blocks of a prompt's whole pages, by the tokens and parents that events gave them."""
        found, parent = list[int](), None
        for start in range(0, len(tokens) // PAGE_SIZE * PAGE_SIZE, PAGE_SIZE):
            page = tuple(tokens[start : start + PAGE_SIZE])
            parent = self._names[medium][parent, page]
            found.append(parent)
        return found

    def close(self) -> None:
        self._socket.close(linger=0)


def _pages(event: dict[str, Any]) -> Iterator[tuple[Page, int]]:
    """The blocks of an event, each by its parent and its tokens."""
    parent, tokens = event["parent_block_hash"], event["token_ids"]
    assert len(tokens) == PAGE_SIZE * len(event["block_hashes"])
    for start, block in zip(range(0, len(tokens), PAGE_SIZE), event["block_hashes"], strict=True):
        yield (parent, tuple(tokens[start : start + PAGE_SIZE])), block
        parent = block


@pytest.fixture(scope="module")
def listener() -> Iterator[Listener]:
    found = Listener()
    yield found
    found.close()


@pytest.fixture(scope="module")
def setup(folder: Path, listener: Listener) -> Setup:
    return Setup(folder / "store", args=[*POOL, "--kv-events-config", listener.config])


@pytest.fixture(scope="module")
def engine(model: Path, folder: Path, setup: Setup) -> Iterator[SGLangServer]:
    with server(model, setup, folder / "events.log") as running:
        yield running


@pytest.fixture(scope="module")
def cold(engine: SGLangServer, setup: Setup, listener: Listener) -> Answer:
    """The first request, stored and heard of."""
    answer = ask(engine, FIRST)
    until(lambda: pages_in_memory(setup) >= len(FIRST) // PAGE_SIZE)
    listener.hear()
    return answer


def test_what_is_stored_is_told_under_the_names_of_the_device(
    cold: Answer, listener: Listener
) -> None:
    on_disk = listener.names("DISK", FIRST)
    assert on_disk == listener.names("GPU", FIRST)
    assert listener.on_disk >= set(on_disk)
    assert len(set(on_disk)) == len(FIRST) // PAGE_SIZE


def test_what_is_restored_is_told_to_who_was_told_to_forget(
    engine: SGLangServer, cold: Answer, listener: Listener
) -> None:
    """A flush empties device and host, and has no event but one that means every medium."""
    engine.post("/flush_cache")
    listener.hear()
    assert not listener.on_disk
    answer = ask(engine, FIRST)
    listener.hear()
    assert answer.storage == whole_pages(FIRST)
    assert answer.tokens == cold.tokens
    assert listener.on_disk >= set(listener.names("GPU", FIRST))


def test_nothing_is_told_of_a_tenant(
    engine: SGLangServer, setup: Setup, listener: Listener, cold: Answer
) -> None:
    """SGLang's names of such blocks are not the names that they are stored under."""
    before, pages = set(listener.on_disk), pages_in_memory(setup)
    ask(engine, FIRST, cache_salt="tenant-a")
    until(lambda: pages_in_memory(setup) >= pages + len(FIRST) // PAGE_SIZE)
    listener.hear()
    assert listener.on_disk == before


def test_a_prefix_from_three_places_is_counted_where_it_came_from(
    engine: SGLangServer, setup: Setup
) -> None:
    """160 tokens on the device, 160 that were evicted to the host, the rest in the store alone."""
    text = prompt(7, 640)
    pages = pages_in_memory(setup)
    before = ask(engine, text)
    until(lambda: pages_in_memory(setup) >= pages + len(text) // PAGE_SIZE)
    engine.post("/flush_cache")
    whole = ask(engine, text[:320])
    branch = ask(engine, text[:160] + prompt(8, 32))
    ask(engine, prompt(9, 700))  # of 1,024 on the device
    answer = ask(engine, text)
    assert (whole.device, whole.host, whole.storage) == (0, 0, whole_pages(text[:320]))
    assert (branch.device, branch.host, branch.storage) == (160, 0, 0)
    assert (answer.device, answer.host, answer.storage) == (160, 160, whole_pages(text) - 320)
    assert answer.tokens == before.tokens


def test_sglangs_metrics_count_the_pages_that_moved(engine: SGLangServer, setup: Setup) -> None:
    """Of all tests above: what was stored is in memory still, what was restored is 3 prefixes."""
    until(lambda: metrics(engine)["sglang:backup_pgs_sum"] == pages_in_memory(setup))
    values = metrics(engine)
    restored = whole_pages(FIRST) + whole_pages(prompt(7, 320)) + whole_pages(prompt(7, 640)) - 320
    assert values["sglang:prefetch_pgs_sum"] * PAGE_SIZE == restored
    assert values["sglang:prefetched_tokens_total"] == restored
    assert values["sglang:prefetch_pgs_count"] == values["sglang:prefetch_bandwidth_count"] == 3
    assert values["sglang:backup_pgs_count"] == values["sglang:backup_bandwidth_count"]


def test_a_clear_takes_back_what_was_told_and_nothing_else(
    engine: SGLangServer, listener: Listener
) -> None:
    """The last test of this file: it empties the store."""
    listener.hear()
    assert listener.on_disk
    elsewhere = {medium: blocks for medium, blocks in listener.blocks.items() if medium != "DISK"}
    assert elsewhere
    engine.post("/hicache/storage-backend/clear")
    listener.hear()
    assert not listener.on_disk
    assert elsewhere == {m: blocks for m, blocks in listener.blocks.items() if m != "DISK"}
