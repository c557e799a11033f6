"""Nodes that know each other, on one machine: their keys, their peer-sharing files, and what each knows of the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..config import Config
from ..peering import folder_of
from ..storage.base import NAMESPACE_BYTES, PAGE_HASH_BYTES
from ..storage.peers.directory import DirectoryView
from ..storage.peers.holdings import Holdings
from ..storage.peers.keys import KeyFiles, KeyPair, public_key
from ..storage.peers.messages import TAG_BYTES
from ..storage.peers.tier import HEAD
from ..storage.slab.tier import SlabTier


@dataclass(frozen=True, slots=True)
class Node:
    """One node, by its place in the network.

    Attributes:
        folder: of its keys and its file.
        listen: where it answers.
        advertise: where others are told that it does.
    """

    name: str
    folder: Path
    listen: str
    advertise: str

    @property
    def file(self) -> Path:
        """Its peer-sharing file."""
        return self.folder / f"{self.name}.yaml"

    @property
    def keys(self) -> KeyFiles:
        return KeyFiles.of(self.folder, self.name)

    @property
    def secret(self) -> Path:
        return self.keys.secret

    @property
    def public(self) -> str:
        return public_key(str(self.keys.public))

    def entry(self, *, encrypted: bool = True) -> dict[str, str]:
        """As another node's file names it."""
        key = {"key": self.public} if encrypted else {}
        return {"name": self.name, "address": self.advertise, **key}

    def write(self, peers: Iterable[Node], *, encrypted: bool = True, **settings: Any) -> Path:
        """Write the file, all at once, as an editor does. Args: settings: further keys."""
        entries = [peer.entry(encrypted=encrypted) for peer in peers]
        own: dict[str, Any] = {"name": self.name, "listen": [self.listen], "peers": entries}
        own |= {"key": str(self.secret)} if encrypted else {"insecure": True}
        if self.advertise != self.listen:
            own["advertise"] = self.advertise
        new = self.file.with_suffix(".new")
        new.write_text(yaml.safe_dump(own | settings))
        new.chmod(0o600)
        return new.rename(self.file)


def make_node(folder: Path, name: str, listen: str, advertise: str = "") -> Node:
    """A node with new keys."""
    node = Node(name, folder, listen, advertise or listen)
    node.keys.write(KeyPair.new())
    return node


# What a node has, and what others know of it.


def tags_of(tiers: Sequence[SlabTier]) -> list[bytes]:
    """The tags of all pages in these tiers, as other nodes are told them."""
    tags = Holdings(tiers).look().added
    return [tags[at : at + TAG_BYTES] for at in range(0, len(tags), TAG_BYTES)]


def known(config: Config, tags: Sequence[bytes]) -> int:
    """How many of these pages the node of this store believes a peer to have."""
    with closing(DirectoryView(folder_of(config) / HEAD)) as view:
        return sum(view.exists([_key_of(tag) for tag in tags]))


def _key_of(tag: bytes) -> bytes:
    """Some page's key that has this tag: that of the hash's start, in a namespace of zeros."""
    return bytes(NAMESPACE_BYTES) + tag + bytes(PAGE_HASH_BYTES - TAG_BYTES)


# The process that answers for a node.


def agent_of(engine: int) -> int:
    """The id of the agent that a process or one of its descendants runs. Raises: LookupError: there is none now."""
    parents = dict(_parents())
    for process in parents:
        if _is_agent(process) and engine in _line(process, parents):
            return process
    raise LookupError(f"process {engine} runs no agent")


def has_agent(engine: int, but: int = 0) -> bool:
    """Whether it runs one now. Args: but: that is not this one."""
    try:
        return agent_of(engine) != but
    except LookupError:
        return False


def _line(process: int, parents: Mapping[int, int]) -> Iterator[int]:
    while process in parents:
        yield process
        process = parents[process]


def _parents() -> Iterator[tuple[int, int]]:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended between the two looks
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                yield int(stat.parent.name), int(parent)


def _is_agent(process: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return b"lmcache_sglang.peer_agent" in Path(f"/proc/{process}/cmdline").read_bytes()
    return False
