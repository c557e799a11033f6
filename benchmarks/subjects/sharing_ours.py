"""Our store between two processes: an agent that serves its pages, and the tier that gets them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

from benchmarks.subjects.base import Batch, Options, Rows, SubjectError, addresses
from benchmarks.subjects.ours import NAMESPACE, segments
from benchmarks.subjects.sharing import Getter, Holder
from lmcache_sglang.kernels.pages import PageSegments
from lmcache_sglang.storage.base import Lookup, page_key
from lmcache_sglang.storage.peers.directory import Directory, PeerRecord
from lmcache_sglang.storage.peers.keys import NO_KEYS, KeyPair
from lmcache_sglang.storage.peers.standing import Standing
from lmcache_sglang.storage.peers.tags import tags_of
from lmcache_sglang.storage.peers.tier import HEAD, PeerLimits, PeerTier
from lmcache_sglang.storage.slab.opening import Place
from lmcache_sglang.storage.slab.settings import SlabSettings
from lmcache_sglang.storage.slab.tier import SlabTier
from lmcache_sglang.testing.loopback_node import LoopbackNode, Ways

SPARE = 1.3  # times the pages' bytes


class OursHolder(Holder):
    """A store in shared memory, and the agent that serves it."""

    encrypted: ClassVar[bool] = False

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._folder = Path(tempfile.mkdtemp(dir=options.directory))
        size = int(options.pages * options.page_bytes * SPARE) + (256 << 20)
        self._tier = SlabTier(Place(self._folder / "cpu", True), size, SlabSettings(), name="cpu")
        keys, self._getter = (
            (KeyPair.new(), KeyPair.new()) if self.encrypted else (NO_KEYS, NO_KEYS)
        )
        allowed = frozenset({self._getter.public}) if self.encrypted else frozenset[str]()
        ways = Ways(streams=options.threads)
        self._node = LoopbackNode(self._folder, self._tier, keys=keys, allowed=allowed, ways=ways)

    def address(self) -> dict[str, str]:
        known = self._node.known
        own = self._getter
        return {"at": known.address, "key": known.key, "public": own.public, "secret": own.secret}

    def hold(self, keys: Sequence[bytes], rows: Rows) -> None:
        named = [page_key(NAMESPACE, key) for key in keys]
        pages = segments(addresses(rows), self.options.page_bytes)
        if not all(stored.kept for stored in self._tier.put(named, pages)):
            raise SubjectError("the CPU tier refused a page")

    def close(self) -> None:
        self._node.stop()
        self._tier.close()
        shutil.rmtree(self._folder)


class OursCurveHolder(OursHolder):
    encrypted: ClassVar[bool] = True


@dataclass(frozen=True)
class _Call:
    keys: list[bytes]
    target: PageSegments


class Ours(Getter):
    """Not encrypted, as it is allowed on loopback. `options.threads`: streams to the peer."""

    setup: ClassVar[str] = "one stream, not encrypted; checksums verified on every read"
    holder: ClassVar[type[Holder]] = OursHolder

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._folder = Path(tempfile.mkdtemp(dir=options.directory))
        self._directory = Directory.create(self._folder / HEAD, 64 << 20)
        self._tell_of(options.service)
        keys = KeyPair(options.service["public"], options.service["secret"])
        limits = PeerLimits(deadline=60.0, streams=options.threads)
        self._tier = PeerTier(self._folder, keys, limits)
        self._calls: dict[bytes, _Call] = {}

    def _tell_of(self, service: dict[str, str]) -> None:
        """The holder, as this node's agent would have written it down."""
        at, key = service["at"], service["key"].encode()
        self._directory.set_record(0, PeerRecord("holder", at, key, Standing.LIVE, 1, 1))
        self._directory.believe(0)
        self._directory.beat()

    def version(self) -> str:
        return f"lmcache-sglang {version('lmcache-sglang')}, PeerTier"

    def prepare(self, batch: Batch) -> None:
        keys = [page_key(NAMESPACE, key) for key in batch.keys]
        self._directory.put(0, tags_of(keys))
        target = segments(addresses(batch.target), self.options.page_bytes)
        self._calls[batch.keys[0]] = _Call(keys, target)

    def get(self, batch: Batch) -> None:
        self._directory.beat()
        call = self._calls[batch.keys[0]]
        if set(self._tier.get(call.keys, call.target)) != {Lookup.HIT}:
            raise SubjectError("a page did not come")

    def close(self) -> None:
        self._tier.close()
        self._directory.close()
        shutil.rmtree(self._folder)
        super().close()


class OursCurve(Ours):
    """Encrypted, as it is by default."""

    setup: ClassVar[str] = "CURVE, as many streams as said; checksums verified on every read"
    holder: ClassVar[type[Holder]] = OursCurveHolder
