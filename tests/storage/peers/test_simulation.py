"""Sixty-four nodes that come and go, and small stories of what can go wrong, in virtual time.

`PEER_SIMULATION_SEEDS` and `PEER_SIMULATION_SECONDS` make the long one longer.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from random import Random
from typing import ClassVar

import pytest

from lmcache_sglang.storage.peers.link import Times
from lmcache_sglang.storage.peers.membership import HEARSAY_SECONDS
from lmcache_sglang.storage.peers.messages import NODES_MOST, UNHEARD
from lmcache_sglang.storage.peers.node import SESSIONS_MOST
from lmcache_sglang.storage.peers.summary import LOG_TAGS, WHOLES
from lmcache_sglang.testing.peer_network import Machine, Network, Skew

TIMES = Times(ping=4.0, silence=12.0)
SLOWEST_CLOCK = 0.98
# Messages that a machine sends on a link in a second: after a freeze of 40 s it answers ten pings that waited, and what
# was told meanwhile; then the link falls, is made anew, and both sides greet, subscribe, tell, hear and name the others.
STORM = 32
CONVERGES = 60.0  # virtual seconds: the longest pause, a silence that ends it in vain, and being told of all nodes


def stale(network: Network) -> float:
    """For how long something may be believed that is so no more.

    What is said takes the network's time, up to three round trips where summaries wait to be heard. What is not said
    because the peer, the connection or the cable is gone is noticed at the first tick after `silence`, by the
    slowest clock.
    """
    tick = network.weather.tick / SLOWEST_CLOCK
    return network.times.silence / SLOWEST_CLOCK + tick + 6 * network.weather.slowest


@pytest.fixture(autouse=True)
def quiet_log(caplog: pytest.LogCaptureFixture) -> None:
    """Every link that falls is a line."""
    caplog.set_level(logging.ERROR, logger="lmcache_sglang.storage.peers.link")


class Churn:
    """What happens to the machines, by chance."""

    def __init__(self, network: Network, random: Random) -> None:
        self.network = network
        self.random = random
        self.happened: Counter[str] = Counter()

    def second(self) -> None:
        random = self.random
        for machine in self.network.up():
            if not machine.is_frozen and random.random() < 0.1:
                self.pages(machine)
        for what, chance in self.CHANCES.items():
            if random.random() < chance:
                self.happened[what.__name__] += 1
                what(self)

    def pages(self, machine: Machine) -> None:
        added = {self.random.getrandbits(64) for _ in range(self.random.randrange(8))}
        count = min(len(machine.pages), self.random.randrange(8))
        machine.change(added, set(self.random.sample(sorted(machine.pages), count)))

    def _one(self) -> Machine | None:
        awake = [each for each in self.network.up() if not each.is_frozen]
        return self.random.choice(awake) if len(awake) > 1 else None

    def crash(self) -> None:
        if (machine := self._one()) is not None:
            pages = set(machine.pages) if self.random.random() < 0.5 else set()
            machine.crash()
            self._comes_back(machine, pages)

    def leave(self) -> None:
        if (machine := self._one()) is not None:
            machine.leave()
            self._comes_back(machine, set())

    def _comes_back(self, machine: Machine, pages: set[int]) -> None:
        if self.random.random() < 0.8:
            self.network.after(self.random.uniform(0.5, 60.0), self._start, machine, pages)

    @staticmethod
    def _start(machine: Machine, pages: set[int]) -> None:
        if not machine.is_up:
            machine.start(pages)

    def clear(self) -> None:
        if (machine := self._one()) is not None:
            machine.clear()

    def freeze(self) -> None:
        if (machine := self._one()) is not None:
            machine.freeze(self.random.uniform(1.0, 40.0))

    def breaks(self) -> None:
        wires = self.network.wires()
        for wire in self.random.sample(wires, min(len(wires), 20)):
            wire.breaks()

    def cut(self) -> None:
        machines = self.network.up()
        some = self.random.sample(machines, self.random.randint(1, len(machines) // 2))
        self.network.cut(some, [each for each in machines if each not in some])
        is_fatal = self.random.random() < 0.5
        self.network.after(self.random.uniform(1.0, 30.0), self.network.mend, is_fatal)

    CHANCES: ClassVar = {crash: 0.1, leave: 0.05, clear: 0.05, freeze: 0.1, breaks: 0.2, cut: 0.03}


def check(network: Network) -> None:
    """What holds at any time."""
    assert network.false_hits(stale(network)) == [], network.report()
    for machine in network.up():
        node = machine.node
        sessions = node.sessions.values()
        assert len(node.links) <= network.most, network.report()
        assert len(node.sessions) <= SESSIONS_MOST, network.report()
        assert len(node.membership) <= network.most, network.report()
        assert all(each.waiting <= UNHEARD for each in sessions), network.report()
        assert node.published._logged <= LOG_TAGS, network.report()
        assert len(node.published._wholes) <= WHOLES, network.report()
    assert all(wire.waiting <= network.weather.queue for wire in network.wires())
    assert network.dropped == 0, network.report()


def crowd(network: Network, random: Random) -> list[Machine]:
    """As many machines as there may be, that know the first one; each with a clock of its own."""
    machines = []
    for number in range(NODES_MOST):
        skew = Skew(random.uniform(-1e6, 1e6), random.uniform(SLOWEST_CLOCK, 1 / SLOWEST_CLOCK))
        machines.append(network.add(f"n{number}", "n0", skew=skew))
    return machines


def busiest(network: Network, since: float) -> int:
    """Messages that one machine sent in one virtual second."""
    return max(max((n for at, n in m.sent.items() if at >= since), default=0) for m in network.up())


SEEDS = int(os.environ.get("PEER_SIMULATION_SEEDS", "2"))
SECONDS = int(os.environ.get("PEER_SIMULATION_SECONDS", "120"))


@pytest.mark.parametrize("seed", range(SEEDS))
def test_sixty_four_nodes_come_and_go(seed: int) -> None:
    network, random = Network(seed, times=TIMES), Random(seed)
    for machine in crowd(network, random):
        network.after(random.uniform(0.0, 5.0), machine.start, {random.getrandbits(64)})
    network.run(CONVERGES)
    assert network.differences() == [], network.report()

    quiet = network.now
    network.run(5 * TIMES.ping)
    links = NODES_MOST - 1
    # Both sides of a link ping, and all clocks may bring their pings into one second.
    assert busiest(network, quiet) <= 2 * links, network.report()

    churn = Churn(network, random)
    for second in range(SECONDS):
        churn.second()
        network.run(1.0)
        if second % 3 == 0:
            check(network)
    assert set(churn.happened) == {what.__name__ for what in churn.CHANCES}
    assert busiest(network, quiet) <= STORM * links, network.report()

    network.mend(breaks=False)
    network.run(CONVERGES + 60.0)  # the last that was to start did so within these
    check(network)
    assert network.differences() == [], network.report()


# Small stories.


def pair(seed: int = 0) -> tuple[Network, Machine, Machine]:
    """Two that know one another, and each what the other has."""
    network = Network(seed, times=TIMES)
    a, b = network.add("a", "b"), network.add("b", skew=Skew(-500.0, 1.01))
    a.start({1, 2})
    b.start({3})
    network.run(5.0)
    assert network.differences() == [], network.report()
    return network, a, b


def believes(machine: Machine, peer: Machine) -> set[int]:
    """What it believes of the peer; nothing, where it doubts it."""
    links = machine.believed()
    return next((set(tags) for link, tags in links if link.known.address == peer.address), set())


def test_who_is_only_known_by_one_side_is_found_by_both() -> None:
    _network, a, b = pair()
    assert believes(a, b) == {3}
    assert believes(b, a) == {1, 2}


def test_a_change_is_known_at_once() -> None:
    network, a, b = pair()
    a.change({9}, {1})
    network.run(2 * network.weather.slowest)
    assert believes(b, a) == {2, 9}


def test_a_clearing_is_known_at_once() -> None:
    network, a, b = pair()
    a.clear()
    network.run(network.weather.slowest)
    assert believes(b, a) == set()
    a.change({7}, set())
    network.run(4 * network.weather.slowest)
    assert believes(b, a) == {7}
    assert len([each for each in network.opens if each[1] == b.address]) == 1  # on the same link


def test_a_crash_is_known_after_the_silence() -> None:
    network, a, b = pair()
    a.crash()
    network.run(TIMES.silence - TIMES.ping - 1.0)
    assert believes(b, a) == {1, 2}
    network.run(TIMES.ping + 2.0 + network.weather.tick)
    assert believes(b, a) == set()


@pytest.mark.parametrize("pages", [{1, 2}, {5}, set[int]()], ids=["the same", "others", "none"])
def test_a_restart_is_a_new_epoch(pages: set[int]) -> None:
    network, a, b = pair()
    epoch = a.node.published.epoch
    a.crash()
    network.run(0.1)
    a.start(pages)
    network.run(TIMES.ping + network.weather.tick + 2.0)
    assert a.node.published.epoch != epoch
    assert believes(b, a) == pages
    assert network.differences() == [], network.report()


def test_a_goodbye_is_known_at_once_and_a_return_soon() -> None:
    network, a, b = pair()
    a.leave()
    network.run(network.weather.slowest)
    assert believes(b, a) == set()
    network.run(1.0)
    a.start({8})
    network.run(2.0 + network.weather.tick)
    assert believes(b, a) == {8}  # it said hello: nobody waits for the end of the pause


def test_a_connection_that_breaks_is_noticed_with_the_next_ping() -> None:
    network, a, b = pair()
    for wire in network.wires():
        wire.breaks()
    a.change({9}, {1})  # told on a connection that there is no more
    network.run(TIMES.ping + 2 * network.weather.tick + 2.0)
    assert believes(b, a) == {2, 9}
    assert network.differences() == [], network.report()


@pytest.mark.parametrize("breaks", [False, True])
def test_a_cut_is_noticed_and_heals(breaks: bool) -> None:
    network, a, b = pair()
    network.cut([a], [b])
    a.change({9}, {1})
    network.run(TIMES.silence + TIMES.ping + network.weather.tick)
    assert believes(b, a) == set()
    network.run(60.0)
    network.mend(breaks)
    network.run(CONVERGES)
    assert believes(b, a) == {2, 9}
    assert network.differences() == [], network.report()


def test_a_short_cut_costs_nothing() -> None:
    network, a, b = pair()
    opens = len(network.opens)
    network.cut([a], [b])
    a.change({9}, {1})
    network.run(3.0)
    network.mend(breaks=False)
    network.run(1.0)
    assert believes(b, a) == {2, 9}
    assert len(network.opens) == opens


@pytest.mark.parametrize("seed", range(4))  # its first act is a tick, or to read what waits
def test_a_frozen_node_is_doubted_and_doubts_when_it_goes_on(seed: int) -> None:
    network, a, b = pair(seed)
    b.freeze(30.0)
    network.run(20.0)
    assert believes(a, b) == set()
    a.crash()
    network.run(10.0 + network.weather.tick)
    assert not b.is_frozen
    assert believes(b, a) == set()
    a.start({4})
    network.run(CONVERGES)
    assert network.differences() == [], network.report()


def test_one_seed_is_enough() -> None:
    network = Network(0, times=TIMES)
    machines = [network.add(f"n{number}", "n0") for number in range(4)]
    for machine in machines:
        machine.start({machines.index(machine)})
    network.run(4 * TIMES.ping)
    assert network.differences() == [], network.report()
    machines[0].crash()
    network.run(2 * TIMES.silence)
    assert network.differences() == [], network.report()  # the others do without it


def test_who_is_gone_is_forgotten_in_the_end() -> None:
    network = Network(0, times=TIMES)
    machines = [network.add(f"n{number}", "n0") for number in range(3)]
    for machine in machines:
        machine.start()
    network.run(20.0)
    machines[2].crash()
    network.run(HEARSAY_SECONDS + 30.0)
    for machine in machines[:2]:
        assert machines[2].address not in {each.address for each in machine.node.membership}
        assert len(machine.node.links) == 1


def test_sixty_three_do_not_come_back_at_once() -> None:
    """All lose the same node at the same time, and find it again."""
    network, random = Network(0, times=TIMES), Random(0)
    machines = crowd(network, random)
    for machine in machines:
        machine.start({random.getrandbits(64)})
    network.run(30.0)
    assert network.differences() == [], network.report()
    since = network.now
    lost = machines[0]
    for wire in list(lost.routes.values()):
        wire.breaks()
    network.run(2 * TIMES.ping)
    assert network.differences() == [], network.report()
    tries = [at for at, _, address in network.opens if at > since and address == lost.address]
    assert len(tries) == NODES_MOST - 1  # each once
    # Ticks of a second, begun at one time: what is due comes with the tick after it, and clocks differ.
    assert max(Counter(int(at * 10) for at in tries).values()) < len(tries) // 2


def test_it_is_the_same_again_with_the_same_seed() -> None:
    def story() -> tuple[int, list[tuple[float, str, str]]]:
        network, a, _b = pair(7)
        a.crash()
        network.run(30.0)
        return network.messages, network.opens

    assert story() == story()
