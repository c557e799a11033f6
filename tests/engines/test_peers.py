"""Two engines with stores of their own: what one computed the other restores, through ZeroMQ and encrypted.

The tests run in their order: each leaves the two engines to the next, and the last ones end them.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from lmcache_sglang.config import Config
from lmcache_sglang.storage.peers.tier import LOOK_SECONDS
from lmcache_sglang.testing.engine import (
    PAGE_SIZE,
    Answer,
    Setup,
    ask,
    memory_tier,
    prompt,
    server,
    until,
    whole_pages,
)
from lmcache_sglang.testing.relay import Relay
from lmcache_sglang.testing.server import SGLangServer, free_port
from lmcache_sglang.testing.tiny_model import make_tiny_llama
from lmcache_sglang.testing.two_nodes import Node, agent_of, has_agent, known, make_node, tags_of

BOUND_SECONDS = 60.0  # of one request
POOL = ("--max-total-tokens", "8192", "--sleep-on-idle")  # one engine mostly waits for the other
UNSHARED, FIRST, SECOND, AFTERWARDS = (prompt(seed) for seed in (1, 2, 3, 4))
LONG = prompt(5, 2000)
PROMPTS = {1: UNSHARED, 2: FIRST, 3: SECOND, 4: AFTERWARDS, 5: LONG}
PAGE_BYTES = PAGE_SIZE * 4 * 2 * 2 * 32 * 4  # tokens, layers, K and V, heads, elements, float32
SLOW = "500KB"  # a second: LONG takes eight


@dataclass(frozen=True, slots=True)
class Pair:
    """Two running engines, A and B, of a node each; B reaches A through a relay."""

    engines: tuple[SGLangServer, SGLangServer]
    nodes: tuple[Node, Node]
    setups: tuple[Setup, Setup]
    relay: Relay

    @property
    def a(self) -> SGLangServer:
        return self.engines[0]

    @property
    def b(self) -> SGLangServer:
        return self.engines[1]

    def compute(self, tokens: list[int]) -> Answer:
        """Ask A, and return when B's node knows all that A's has, and its engine must."""
        before = len(self.stored_by_a())
        answer = ask(self.a, tokens)
        until(lambda: len(self.stored_by_a()) >= before + len(tokens) // PAGE_SIZE)
        self.await_knowledge()
        return answer

    def stored_by_a(self) -> list[bytes]:
        with closing(memory_tier(self.setups[0])) as tier:
            return tags_of([tier])

    def await_knowledge(self) -> None:
        config = Config.of(self.setups[1].settings)
        tags = self.stored_by_a()
        until(lambda: known(config, tags) == len(tags))
        time.sleep(LOOK_SECONDS)  # an engine looks for new peers no more often, and tells nobody


@pytest.fixture(scope="module")
def right(model: Path, folder: Path) -> dict[int, list[int]]:
    """What an engine without a store answers, by seed."""
    alone = Setup(folder / "none", flag=False, args=POOL)
    with server(model, alone, folder / "alone.log") as engine:
        return {seed: ask(engine, tokens).tokens for seed, tokens in PROMPTS.items()}


@pytest.fixture(scope="module")
def pair(model: Path, folder: Path, right: dict[int, list[int]]) -> Iterator[Pair]:
    """A knows B; B does not know A yet."""
    port = free_port()
    with Relay(("127.0.0.1", port)) as relay:
        through = "tcp://{}:{}".format(*relay.address)
        a = make_node(folder / "a", "node-a", f"tcp://127.0.0.1:{port}", through)
        b = make_node(folder / "b", "node-b", f"tcp://127.0.0.1:{free_port()}")
        a.write([b])
        b.write([])
        setups = setup_of(a), setup_of(b)
        engines = (
            server(model, setups[0], folder / "a.log"),
            server(model, setups[1], folder / "b.log"),
        )
        try:
            with ThreadPoolExecutor() as both:
                list(both.map(SGLangServer.start, engines))
            yield Pair(engines, (a, b), setups, relay)
        finally:
            for engine in engines:
                engine.kill()


def setup_of(node: Node) -> Setup:
    return Setup(node.folder / "store", disk=0, args=POOL, peers=node.file)


def test_a_node_that_is_not_in_the_file_is_not_asked(
    pair: Pair, right: dict[int, list[int]]
) -> None:
    """Nor is it let in: A has the pages, and B's key, but B has none of A's."""
    ask(pair.a, UNSHARED)
    until(lambda: len(pair.stored_by_a()) >= len(UNSHARED) // PAGE_SIZE)
    answer = ask(pair.b, UNSHARED)
    assert answer.storage == 0
    assert answer.tokens == right[1]


def test_a_peer_that_is_added_at_run_time_is_read_from(
    pair: Pair, right: dict[int, list[int]]
) -> None:
    a, b = pair.nodes
    b.write([a])
    computed = pair.compute(FIRST)
    answer = ask(pair.b, FIRST)
    assert answer.storage == whole_pages(FIRST)
    assert answer.device == answer.host == 0
    assert answer.backend == "lmcache"
    assert answer.tokens == computed.tokens == right[2]
    assert pair.relay.back >= whole_pages(FIRST) // PAGE_SIZE * PAGE_BYTES


def test_an_agent_that_dies_is_started_again_and_read_from(
    pair: Pair, right: dict[int, list[int]]
) -> None:
    dead = agent_of(pair.a.pid)
    os.kill(dead, signal.SIGKILL)
    until(lambda: has_agent(pair.a.pid, but=dead))
    pair.compute(SECOND)
    answer = ask(pair.b, SECOND)
    assert answer.storage == whole_pages(SECOND)
    assert answer.tokens == right[3]


def test_a_node_that_is_killed_in_a_transfer_costs_a_recomputation_and_no_token(
    pair: Pair, right: dict[int, list[int]]
) -> None:
    a, b = pair.nodes
    pair.compute(LONG)
    pair.compute(AFTERWARDS)
    a.write([b], limits={"bandwidth": SLOW})
    until(lambda: f"{a.file} was read again" in pair.a.log)
    before = pair.relay.back
    with ThreadPoolExecutor(1) as client:
        asked = client.submit(ask, pair.b, LONG, timeout=BOUND_SECONDS)
        pair.relay.wait_for(before + 10 * PAGE_BYTES)
        assert not asked.done()
        agent = agent_of(pair.a.pid)
        pair.a.kill()
        os.kill(agent, signal.SIGKILL)  # its process group is its own
        answer = asked.result()
    assert answer.storage < whole_pages(LONG)
    assert answer.tokens == right[5]
    later = ask(pair.b, AFTERWARDS, timeout=BOUND_SECONDS)
    assert later.storage == 0
    assert later.tokens == right[4]


def test_another_model_of_the_same_name_never_hits(
    folder: Path, pair: Pair, right: dict[int, list[int]]
) -> None:
    """B has kept what it read from A. The control is that the other node knows all of it, and its own engine is not
    given any."""
    _, b = pair.nodes
    c = make_node(folder / "c", "node-c", f"tcp://127.0.0.1:{free_port()}")
    c.write([b])
    b.write([c])
    other = make_tiny_llama(folder / "other", seed=2, dtype="float32")
    setup = setup_of(c)
    with closing(memory_tier(pair.setups[1])) as tier:
        tags = tags_of([tier])
    assert len(tags) >= len(FIRST) // PAGE_SIZE
    with server(other, setup, folder / "other.log") as engine:
        config = Config.of(setup.settings)
        until(lambda: known(config, tags) == len(tags))
        answer = ask(engine, FIRST)
    assert answer.storage == 0
    assert answer.tokens != right[2]
