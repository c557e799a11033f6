"""Nodes as users make them: a store with a peer-sharing file, and the agent that it starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lmcache_sglang import Config, Store
from lmcache_sglang.errors import ConfigError
from lmcache_sglang.peer_guardian import Guardian
from lmcache_sglang.peering import Peering, folder_of
from lmcache_sglang.testing.server import free_port
from lmcache_sglang.testing.tier_suite import (
    OTHER_NAMESPACE,
    EngineMemory,
    a_key,
    bytes_of,
    some_keys,
)
from lmcache_sglang.testing.two_nodes import Node, make_node
from lmcache_sglang.testing.waiting import wait_until

SIZE = 64 << 10
KEYS = some_keys(12)


QUICK = {"ping": 0.2, "silence": 1.0}


@dataclass(frozen=True)
class Site:
    """A node, and where its store lies."""

    node: Node
    memory: Path

    @property
    def name(self) -> str:
        return self.node.name

    def write(self, *peers: Site, **settings: Any) -> None:
        """The peer-sharing file."""
        self.node.write([peer.node for peer in peers], **{"limits": QUICK, **settings})

    @property
    def config(self) -> Config:
        return Config.of(
            {
                "path": str(self.node.folder / self.name),
                "cpu": {"size": "32MiB", "path": str(self.memory / self.name)},
                "disk": {"size": 0},
                "peers": str(self.node.file),
            }
        )


def guardian_of(store: Store) -> Guardian:
    peering = store._chain.tiers[-1]
    assert isinstance(peering, Peering)
    return peering._guardian


def agent_of(store: Store) -> int:
    """The process that answers for its node."""
    agent = guardian_of(store)._agent
    assert agent is not None
    return agent.pid


@pytest.fixture
def sites(tmp_path: Path, shared_memory: Path) -> list[Site]:
    """Two that know each other, and one that they do not know."""
    a, b, c = (
        Site(make_node(tmp_path, name, f"tcp://127.0.0.1:{free_port()}"), shared_memory)
        for name in "abc"
    )
    a.write(b)
    b.write(a)
    c.write(a, b)
    return [a, b, c]


@pytest.fixture
def opened(sites: list[Site]) -> Iterator[Callable[[Site], Store]]:
    with ExitStack() as undo:
        yield lambda site: undo.enter_context(closing(Store(site.config)))


def put(store: Store, keys: Sequence[bytes] = KEYS) -> None:
    memory = EngineMemory([bytes_of(key, SIZE) for key in keys])
    assert all(store.put(keys, memory.segments))


def read(store: Store, keys: Sequence[bytes] = KEYS) -> list[bool]:
    memory = EngineMemory.blank([SIZE] * len(keys))
    came = store.get(keys, memory.segments)
    for i, here in enumerate(came):
        assert not here or memory.page(i) == bytes_of(keys[i], SIZE)
    return came


def knows(store: Store, keys: Sequence[bytes] = KEYS) -> Callable[[], bool]:
    return lambda: all(store.exists(keys))


def test_what_one_node_has_the_other_one_finds(
    sites: list[Site], opened: Callable[[Site], Store]
) -> None:
    a, b = opened(sites[0]), opened(sites[1])
    put(a)
    wait_until(knows(b))
    assert read(b) == [True] * len(KEYS)
    assert b.stats()[0].pages == len(KEYS), "it is kept"
    assert b.faults() == {}


def test_what_was_there_before_the_nodes_met_is_found(
    sites: list[Site], opened: Callable[[Site], Store]
) -> None:
    put(opened(sites[0]))
    wait_until(knows(opened(sites[1])))


def test_what_is_cleared_is_found_no_more(
    sites: list[Site], opened: Callable[[Site], Store]
) -> None:
    a, b = opened(sites[0]), opened(sites[1])
    theirs = [a_key(number, OTHER_NAMESPACE) for number in range(3)]
    put(a)
    put(a, theirs)
    wait_until(knows(b, [*KEYS, *theirs]))
    a.clear(OTHER_NAMESPACE)
    wait_until(lambda: not any(b.exists(theirs)))
    assert all(b.exists(KEYS))


def test_a_node_that_nobody_allows_learns_nothing(
    sites: list[Site], opened: Callable[[Site], Store], capfd: pytest.CaptureFixture[str]
) -> None:
    a, stranger = opened(sites[0]), opened(sites[2])
    put(a)
    said: list[str] = []

    def refused() -> bool:
        said.append(capfd.readouterr().err)
        return "is not on `allow`" in "".join(said)

    wait_until(refused)
    assert not any(stranger.exists(KEYS))


def test_a_node_that_is_allowed_later_needs_no_restart(
    sites: list[Site], opened: Callable[[Site], Store]
) -> None:
    site, _, newcomer = sites
    a, c = opened(site), opened(newcomer)
    put(a)
    site.write(allow=[newcomer.node.public])
    wait_until(knows(c))
    assert read(c) == [True] * len(KEYS)


def test_an_agent_that_was_killed_is_started_again(
    sites: list[Site], opened: Callable[[Site], Store]
) -> None:
    a, b = opened(sites[0]), opened(sites[1])
    put(a, KEYS[:4])
    wait_until(knows(b, KEYS[:4]))
    first = agent_of(a)
    os.kill(first, signal.SIGKILL)
    put(a)
    wait_until(knows(b))
    assert read(b) == [True] * len(KEYS)
    assert agent_of(a) != first


def test_the_agent_ends_with_the_process_that_started_it(sites: list[Site]) -> None:
    script = (
        "import sys, json, os, signal\n"
        "from lmcache_sglang import Config, Store\n"
        "store = Store(Config.of(json.loads(sys.argv[1])))\n"
        "print(store._chain.tiers[-1]._guardian._agent.pid, flush=True)\n"
        "signal.pause()\n"
    )
    settings = sites[0].config.model_dump_json()
    with subprocess.Popen(
        [sys.executable, "-c", script, settings], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        agent = int(process.stdout.readline())
        process.kill()
    wait_until(lambda: not _lives(agent))


def _lives(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_two_processes_of_a_node_have_one_agent(sites: list[Site]) -> None:
    with (
        closing(Peering(sites[0].config, sites[0].node.file)) as first,
        closing(Peering(sites[0].config, sites[0].node.file)) as second,
    ):
        assert second._guardian._agent is None
        assert first._guardian._agent is not None
        first.close()
        wait_until(lambda: second._guardian._agent is not None)


def test_a_port_that_is_taken_stops_the_start(
    sites: list[Site], opened: Callable[[Site], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(sites[0])
    sites[1].write(listen=sites[0].node.listen)
    with pytest.raises(ConfigError, match=r"listen.*give another address or port") as caught:
        Store(sites[1].config)
    assert caught.value.setting == "listen"


def test_a_file_that_cannot_be_used_stops_the_start(sites: list[Site]) -> None:
    sites[0].write(nonsense=1)
    with pytest.raises(ConfigError, match="nonsense"):
        Store(sites[0].config)


def test_a_folder_of_somebody_else_is_not_trusted(sites: list[Site]) -> None:
    folder = folder_of(sites[0].config)
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match="can be written to by others"):
        Store(sites[0].config)


def test_share_says_what_others_see(sites: list[Site], opened: Callable[[Site], Store]) -> None:
    ours = KEYS[0][:16].hex()
    sites[0].write(sites[1], share={"namespaces": [ours]})
    a, b = opened(sites[0]), opened(sites[1])
    theirs = [a_key(number, OTHER_NAMESPACE) for number in range(3)]
    put(a, theirs)
    put(a)
    wait_until(knows(b))
    assert not any(b.exists(theirs))
    sites[0].write(sites[1], share=False)
    wait_until(lambda: not any(b.exists(KEYS)))
    sites[0].write(sites[1])
    wait_until(knows(b, theirs))


def test_what_is_not_to_be_kept_is_read_again_from_the_peer(
    sites: list[Site], opened: Callable[[Site], Store]
) -> None:
    sites[1].write(sites[0], keep="never")
    a, b = opened(sites[0]), opened(sites[1])
    put(a)
    wait_until(knows(b))
    for _ in range(2):
        assert read(b) == [True] * len(KEYS)
    assert b.stats()[0].pages == 0


def test_a_dns_names_addresses_are_peers(
    sites: list[Site], opened: Callable[[Site], Store]
) -> None:
    a, b = sites[:2]
    b.write(
        dns={
            "name": "localhost",
            "port": int(a.node.listen.rsplit(":")[-1]),
            "key": a.node.public,
            "every": 0.2,
        }
    )
    store, other = opened(b), opened(a)
    put(other)
    wait_until(knows(store))
    assert read(store) == [True] * len(KEYS)


def test_a_seed_tells_of_the_others(sites: list[Site], opened: Callable[[Site], Store]) -> None:
    """Both know only the seed, and allow each other."""
    seed, b, c = sites
    known = [site.node.public for site in sites]
    entry = {"address": seed.node.listen, "key": seed.node.public}
    seed.write(allow=known)
    for site in (b, c):
        site.write(seeds=[entry], allow=known)
    stores = [opened(site) for site in sites]
    put(stores[1])
    wait_until(knows(stores[2]))
    assert read(stores[2]) == [True] * len(KEYS)


def test_nodes_of_one_machine_meet_in_the_file_system(
    tmp_path: Path, shared_memory: Path, opened: Callable[[Site], Store]
) -> None:
    a, b = (
        Site(make_node(tmp_path, name, f"ipc://{shared_memory}/{name}.sock"), shared_memory)
        for name in "de"
    )
    for site, other in ((a, b), (b, a)):
        site.node.write([other.node], encrypted=False, limits=QUICK)
    first, second = opened(a), opened(b)
    put(first)
    wait_until(knows(second))
    assert read(second) == [True] * len(KEYS)


def test_who_is_no_longer_allowed_gets_no_more_pages(
    sites: list[Site], opened: Callable[[Site], Store]
) -> None:
    """Not even over a connection that it has."""
    a, b = sites[:2]
    b.write(a, keep="never", limits={**QUICK, "deadline": 1.0})
    first, second = opened(a), opened(b)
    put(first)
    wait_until(knows(second))
    assert read(second) == [True] * len(KEYS)
    a.write()
    wait_until(lambda: not any(read(second)))


def test_little_memory_for_sending_is_enough_for_pages_that_fit(
    sites: list[Site], opened: Callable[[Site], Store]
) -> None:
    a, b = sites[:2]
    a.write(b, limits={**QUICK, "in_flight": "3MiB"})
    first, second = opened(a), opened(b)
    put(first)
    wait_until(knows(second))
    assert read(second) == [True] * len(KEYS)


def test_a_file_that_cannot_be_read_any_more_changes_nothing(
    sites: list[Site], opened: Callable[[Site], Store]
) -> None:
    a, b = sites[:2]
    first, second = opened(a), opened(b)
    for broken in ("name: 2026-13-45\n", "[", "name: [", "\0"):
        a.node.file.write_text(broken)
        put(first, KEYS[:1])
    put(first)
    wait_until(knows(second))
    a.write(b, share=False)
    wait_until(lambda: not any(second.exists(KEYS)))
