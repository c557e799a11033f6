"""Nodes as processes with a network of their own each, on a cable that is slow and lossy, is cut and is listened to.

What is cut and lost here are the packets of real TCP connections, and the agents are those that engines start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from lmcache_sglang.testing.cable import Cable, why_not
from lmcache_sglang.testing.engine import until
from lmcache_sglang.testing.peer_node import PeerNode
from lmcache_sglang.testing.store_process import run
from lmcache_sglang.testing.tier_suite import PAGE, bytes_of
from lmcache_sglang.testing.two_nodes import Node, make_node
from lmcache_sglang.testing.two_tiers import keys_of

PORT = 7801
DELAY, LOSS = 0.01, 0.02  # seconds to the other side; of the packets
LIMITS = {"ping": 0.2, "silence": 2.0, "deadline": 3.0}
SAMPLE = 32  # bytes of a page that no other bytes are equal to
PAGES = range(100)


@pytest.fixture(scope="module", autouse=True)
def allowed() -> None:
    if refused := run(why_not):
        pytest.skip(f"no network of its own for a process here: {refused}")


class Net:
    """Nodes by their number, from 1, and what they have in common."""

    def __init__(self, folder: Path, memory: Path, cable: Cable, undo: ExitStack) -> None:
        self._folder, self._memory, self._undo = folder, memory, undo
        self.cable = cable
        self.nodes: list[Node] = []

    def make(self, count: int) -> None:
        """Keys for so many nodes."""
        for number in range(1, count + 1):
            name = f"node-{number}"
            listen = f"tcp://{address_of(number)}:{PORT}"
            self.nodes.append(make_node(self._folder / name, name, listen))

    def start(
        self, number: int, peers: Sequence[int], *, encrypted: bool = True, **settings: object
    ) -> PeerNode:
        """Start a node that has these in its file, and lets all others in."""
        node = self.nodes[number - 1]
        others = [each for each in self.nodes if each is not node]
        allow = {"allow": [each.public for each in others]} if encrypted else {}
        known = [self.nodes[peer - 1] for peer in peers]
        node.write(known, encrypted=encrypted, **{"limits": LIMITS, **allow, **settings})
        address = address_of(number)
        running = PeerNode(node, self._memory / node.name, cable=self.cable.path, address=address)
        self._undo.callback(running.end)
        return running

    def pair(self, *, encrypted: bool = True, **settings: object) -> tuple[PeerNode, PeerNode]:
        """Two nodes that know each other. Args: settings: of the first."""
        self.make(2)
        first = self.start(1, [2], encrypted=encrypted, **settings)
        return first, self.start(2, [1], encrypted=encrypted)


def address_of(number: int) -> str:
    return f"10.9.0.{number}"


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def net(tmp_path: Path, shared_memory: Path, undo: ExitStack) -> Net:
    """On a bad cable."""
    cable = undo.enter_context(Cable(tmp_path / "cable", delay=DELAY, loss=LOSS))
    return Net(tmp_path, shared_memory, cable, undo)


def knows(node: PeerNode, numbers: Sequence[int]) -> None:
    """Return when it believes that somebody has all of these pages."""
    until(lambda: all(node.exists(numbers)))


def doubts(node: PeerNode, numbers: Sequence[int]) -> None:
    """Return when it believes that nobody has any of them."""
    until(lambda: not any(node.exists(numbers)))


def test_pages_come_through_a_slow_and_lossy_network(net: Net) -> None:
    one, two = net.pair()
    one.put(PAGES)
    knows(two, PAGES)
    assert all(two.get(PAGES))
    two.put(range(100, 110))
    knows(one, range(100, 110))
    assert all(one.get(range(100, 110)))
    assert net.cable.lost > 0


def test_a_cable_that_is_cut_in_a_transfer_costs_misses_and_no_hang(
    tmp_path: Path, shared_memory: Path, undo: ExitStack
) -> None:
    """`get` compares what comes; here as well that it ends, and that the pages come once the cable is mended."""
    left = [10 * PAGE]  # bytes until it is cut

    def cut_in_time(packet: bytes) -> None:
        if armed and packet[12:16] == bytes([10, 9, 0, 1]):
            left[0] -= len(packet)
            if left[0] < 0:
                cable.cut(address_of(1))

    armed: list[bool] = []
    cable = undo.enter_context(Cable(tmp_path / "cable", on_packet=cut_in_time))
    one, two = Net(tmp_path, shared_memory, cable, undo).pair()
    one.put(PAGES)
    knows(two, PAGES)
    armed.append(True)
    came = two.get(PAGES)
    assert left[0] < 0
    assert not all(came)
    doubts(two, [number for number in PAGES if not came[number]])
    armed.clear()
    cable.mend(address_of(1))
    knows(two, PAGES)
    until(lambda: all(two.get(PAGES)))


def test_four_nodes_find_each_other_through_one_and_outlive_a_partition(net: Net) -> None:
    """All have the first in their file and allow the others' keys."""
    net.make(4)
    nodes = [net.start(number, [1] if number > 1 else []) for number in range(1, 5)]
    own = [range(10 * number, 10 * number + 10) for number in range(4)]
    for node, numbers in zip(nodes, own, strict=True):
        node.put(numbers)
    knows(nodes[3], own[1])
    assert all(nodes[3].get(own[1]))
    net.cable.cut(address_of(3))
    for node in (nodes[0], nodes[1], nodes[3]):
        doubts(node, own[2])
    knows(nodes[1], own[0])
    assert all(nodes[1].get(own[0]))
    assert all(nodes[2].exists(own[2]))
    net.cable.mend(address_of(3))
    for node in nodes:
        for numbers in own:
            knows(node, numbers)
    until(lambda: all(nodes[0].get(own[2])))
    until(lambda: all(nodes[2].get(own[3])))


@pytest.mark.parametrize("encrypted", [True, False])
def test_whether_pages_travel_in_clear(
    tmp_path: Path, shared_memory: Path, undo: ExitStack, encrypted: bool
) -> None:
    """The one with the other: where nothing is encrypted, a look at the packets finds all of the pages."""
    packets: list[bytes] = []
    cable = undo.enter_context(Cable(tmp_path / "cable", on_packet=packets.append))
    one, two = Net(tmp_path, shared_memory, cable, undo).pair(encrypted=encrypted)
    one.put(PAGES)
    knows(two, PAGES)
    assert all(two.get(PAGES))
    sent = b"".join(_of_port(packet) for packet in packets)
    assert len(sent) > len(PAGES) * PAGE
    keys = keys_of(PAGES)
    clear = [bytes_of(key)[PAGE // 2 : PAGE // 2 + SAMPLE] in sent for key in keys]
    named = [key[16:] in sent for key in keys]
    if encrypted:
        assert not any(clear) and not any(named)
    else:
        assert sum(clear) > len(PAGES) * 0.9  # some samples lie in two packets
        assert any(named)


def _of_port(packet: bytes) -> bytes:
    """What a TCP packet carries from or to the nodes' port; empty: it is another one."""
    header = (packet[0] & 15) * 4
    source, to = packet[header : header + 2], packet[header + 2 : header + 4]
    if packet[9] != 6 or PORT.to_bytes(2, "big") not in (source, to):
        return b""
    return packet[header + (packet[header + 12] >> 4) * 4 :]
