"""PeerCache between two processes, by the calls of its HiCache backend."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any, ClassVar

# Not a dependency of this project: it is in its own environment (benchmarks/peers).
from peercache.store import PeerCacheStore  # type: ignore[import-not-found]

from benchmarks.subjects.base import Batch, Options, Rows, SubjectError, addresses
from benchmarks.subjects.ports import free_port
from benchmarks.subjects.sharing import Getter, Holder

SPARE = 1.25  # times the pages' bytes
BOTH = 2  # nodes
MEMBER_SECONDS = 20.0
LOOK_SECONDS = 0.05
REMEMBERED = 3600.0  # seconds for which a page's place is not asked for again


class _Memory:
    """A host pool as its backend asks it: pages by their numbers, all of one length."""

    def __init__(self, rows: Rows) -> None:
        self._page_bytes = rows.shape[1]
        self._pages: list[int] = []
        self.kv_buffer = SimpleNamespace(
            data_ptr=lambda: rows.ctypes.data, numel=lambda: rows.nbytes, element_size=lambda: 1
        )

    def add(self, rows: Rows) -> range:
        """The numbers of these pages from now on."""
        first = len(self._pages)
        self._pages += addresses(rows)
        return range(first, len(self._pages))

    def get_page_buffer_meta(self, pages: Sequence[int]) -> tuple[list[int], list[int]]:
        return [self._pages[page] for page in pages], [self._page_bytes] * len(pages)


def _numbers(store: Any, rows: Rows) -> range:
    """Of pages in memory that the store is to know."""
    if store.mem_pool_host is None:
        store.register_mem_pool_host(_Memory(rows))
    numbers: range = store.mem_pool_host.add(rows)
    return numbers


def _store(options: Options, name: str, discovery: str) -> Any:
    extra = {
        "discovery_addr": discovery,
        "protocol": "tcp",
        "local_hostname": "127.0.0.1",
        "node_id": name,
        "heartbeat_interval": 0.5,
        "member_ttl": 60.0,
        "global_segment_size": int(options.pages * options.page_bytes * SPARE),
        "directory_read_cache_ttl": REMEMBERED,
        "metrics_enabled": False,
        "disk_enabled": False,
    }
    alone = {"tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1}
    return PeerCacheStore(SimpleNamespace(**alone, is_mla_model=True, extra_config=extra))


def _wait_for_both(store: Any) -> None:
    """Until each node knows the other: where a page is looked up depends on who is there.

    Raises:
        SubjectError: not in time.
    """
    pause = threading.Event()
    for _ in range(int(MEMBER_SECONDS / LOOK_SECONDS)):
        if len(store.runtime.ring) >= BOTH:
            return
        pause.wait(LOOK_SECONDS)
    raise SubjectError("the two nodes did not find each other")


class PeerCacheHolder(Holder):
    """The node that publishes, with the discovery service in it."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._discovery = f"127.0.0.1:{free_port()}"
        self._store = _store(options, "holder", self._discovery)

    def address(self) -> dict[str, str]:
        return {"discovery": self._discovery}

    def hold(self, keys: Sequence[bytes], rows: Rows) -> None:
        _wait_for_both(self._store)
        names = [key.hex() for key in keys]
        if not all(self._store.batch_set_v1(names, _numbers(self._store, rows))):
            raise SubjectError("batch_set_v1 refused a page")

    def close(self) -> None:
        self._store.close()


class PeerCache(Getter):
    setup: ClassVar[str] = (
        "its TCP transport, p2p mode, pages of one component, batch_get_v1 in a registered host pool, "
        "directory_read_cache_ttl so that no page's place is asked for twice, metrics and disk off; tried with pages of "
        "2 MiB and not faster than two threads that call: four"
    )
    holder: ClassVar[type[Holder]] = PeerCacheHolder

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._store = _store(options, "getter", options.service["discovery"])
        self._calls: dict[bytes, tuple[list[str], range]] = {}
        _wait_for_both(self._store)

    def version(self) -> str:
        return f"peercache {version('peercache')}"

    def prepare(self, batch: Batch) -> None:
        names = [key.hex() for key in batch.keys]
        self._calls[batch.keys[0]] = names, _numbers(self._store, batch.target)

    def get(self, batch: Batch) -> None:
        names, pages = self._calls[batch.keys[0]]
        if not all(self._store.batch_get_v1(names, pages)):
            raise SubjectError("batch_get_v1 missed a page")

    def close(self) -> None:
        self._store.close()
        super().close()
