"""A node in a process of its own, with an agent as an engine has it, that a test tells what to do.

    a = PeerNode(make_node(folder, "a", "tcp://10.9.0.1:7801"), memory, cable=cable.path, address="10.9.0.1")
    a.put([1, 2, 3])
    b.get([1, 2, 3])

Pages go by number; whatever is read is compared with what it must be.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ..config import Config
from ..storage.chain import Chain
from ..store import open_chain
from . import two_tiers
from .cable import plug_in
from .store_process import Job
from .two_nodes import Node

SIZE = "64MiB"  # of the store, in memory
SECONDS = 60.0  # after which an answer counts as never given


class PeerNode:
    """The test's side.

    Args:
        node: its file must be written.
        memory: a folder in shared memory for its store; the agent's directory comes beside it.
        cable: to plug in before anything else; None: it stays in this process's network.
        address: of its end of the cable.
    """

    def __init__(
        self, node: Node, memory: Path, *, cable: Path | None = None, address: str = ""
    ) -> None:
        self.node = node
        self._tell, told = multiprocessing.Pipe()
        settings: dict[str, object] = {
            "path": str(node.folder / "store"),
            "cpu": {"size": SIZE, "path": str(memory)},
            "disk": {"size": 0},
            "peers": str(node.file),
        }
        self._job = Job(_run, told, settings, cable, address)
        told.close()
        assert self._answer() == "ready"

    def put(self, numbers: Sequence[int]) -> None:
        """Keep these pages on this node. Raises: AssertionError: it does not."""
        assert all(self._ask("put", numbers))

    def get(self, numbers: Sequence[int]) -> list[bool]:
        """Which of these pages came, from here or from peers."""
        return self._ask("get", numbers)

    def exists(self, numbers: Sequence[int]) -> list[bool]:
        """Which of these are here, or believed to be on a peer."""
        return self._ask("exists", numbers)

    def end(self) -> None:
        """Close the store as an engine does that is stopped."""
        self._tell.send(("end", []))
        self._job.result(SECONDS)
        self._tell.close()

    def kill(self) -> None:
        self._job.kill()
        self._tell.close()

    def _ask(self, what: str, numbers: Sequence[int]) -> list[bool]:
        self._tell.send((what, list(numbers)))
        answer: list[bool] = self._answer()
        return answer

    def _answer(self) -> Any:
        if not self._tell.poll(SECONDS):
            self._job.kill()
            raise AssertionError(f"{self.node.name} did not answer within {SECONDS:.0f} s")
        try:
            return self._tell.recv()
        except EOFError:
            return self._job.result(SECONDS)  # raises what it died of


def _run(told: Connection, settings: dict[str, object], cable: Path | None, address: str) -> None:
    if cable is not None:
        plug_in(address, cable)
    with closing(open_chain(Config.of(settings))) as chain:
        told.send("ready")
        while True:
            what, numbers = told.recv()
            if what == "end":
                return
            told.send(_do(chain, what, two_tiers.keys_of(numbers)))


def _do(chain: Chain, what: str, keys: Sequence[bytes]) -> list[bool]:
    match what:
        case "put":
            return two_tiers.put(chain, keys)
        case "get":
            return two_tiers.get(chain, keys)
        case _:
            return chain.exists(keys)
