"""Ranks of an engine without a model, each a `RankTree` in a process of its own, driven from a test.

    with Nursery(folder) as nursery, nursery.ranks(Family("mha", 16, ranks=2), store) as ranks:
        ranks.call("write", tokens)  # what each rank returned

The plug-in's hooks are for a whole process and for good, and SGLang takes seconds to import. So one process
imports it, loads the plug-ins as SGLang does, and forks a process for each rank. Ranks meet over gloo, on
the loopback interface.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from io import TextIOWrapper
from itertools import count
from pathlib import Path
from socketserver import ForkingMixIn, StreamRequestHandler, UnixStreamServer
from typing import Any, Self

import msgspec

from .rank_direct import DirectTree
from .rank_pools import HEADS, LAYERS, Family
from .rank_tree import RankTree
from .sglang_cpu.config import VARIABLE

START_SECONDS = 120.0  # to import SGLang on a busy machine
CALL_SECONDS = 90.0  # after which a call to a rank counts as hung
GROUP_SECONDS = 45.0  # for which a rank waits for another

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 2 * HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": HEADS,
}


class Ranks:
    """The ranks of one engine."""

    def __init__(self, connections: list[socket.socket], log: Path) -> None:
        self._files = [connection.makefile("rw") for connection in connections]
        self._log = log

    def call(self, method: str, *args: object) -> list[Any]:
        """What a method of `RankTree` returns on each rank. Raises: AssertionError; TimeoutError."""
        return self.ask([[method, list(args)]] * len(self._files))

    def only(self, rank: int, method: str, *args: object) -> Any:
        """The same on one rank, for a method that does not touch the tree."""
        return self._ask([self._files[rank]], [[method, list(args)]])[0]

    def ask(self, messages: Sequence[object]) -> list[Any]:
        """Send each rank its message, then wait for the answers of all."""
        return self._ask(self._files, messages)

    def _ask(self, files: list[TextIOWrapper], messages: Sequence[object]) -> list[Any]:
        for file, message in zip(files, messages, strict=True):
            file.write(json.dumps(message) + "\n")
            file.flush()
        answers = [file.readline() for file in files]
        assert all(answers), f"a rank ended:\n{self._log.read_text()[-4000:]}"
        return [json.loads(answer) for answer in answers]


class Nursery:
    """The process that ranks are forked from.

    Args:
        folder: for the model, the socket and the log.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._model = folder / "model"
        self._socket = folder / "socket"
        self._log = folder / "ranks.log"
        self._engines = count()

    def __enter__(self) -> Self:
        self._model.mkdir(exist_ok=True)
        (self._model / "config.json").write_text(json.dumps(CONFIG))
        (self._model / "model.bin").write_bytes(b"weights")
        # Put before the command, so that the rest of the environment is inherited unread.
        own = ["env", f"{VARIABLE}=1", "GLOO_SOCKET_IFNAME=lo"]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*own, sys.executable, "-W", "ignore", "-m", __name__, str(self._socket)],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        with ExitStack() as undo:
            undo.callback(self.__exit__)
            self._wait_until_it_listens()
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """End it and all ranks."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _wait_until_it_listens(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._socket.exists():
            assert self._process.poll() is None, self._log.read_text()[-4000:]
            assert time.monotonic() < deadline, "SGLang is not imported in time"
            time.sleep(0.05)

    @contextmanager
    def ranks(self, family: Family, store: dict[str, Any], **settings: Any) -> Iterator[Ranks]:
        """An engine's ranks over a store.

        Args:
            store: its settings; with `direct`, each rank is a `DirectTree`.
            settings: of the engine's command line.
        """
        meeting = self._folder / f"meeting-{next(self._engines)}"
        with ExitStack() as opened:
            connections = []
            for _ in range(family.ranks):
                connection = opened.enter_context(socket.socket(socket.AF_UNIX))
                connection.settimeout(CALL_SECONDS)
                connection.connect(str(self._socket))
                connections.append(connection)
            ranks = Ranks(connections, self._log)
            ranks.ask(
                [
                    {
                        "family": msgspec.to_builtins(family),
                        "model": str(self._model),
                        "store": store,
                        "rank": rank,
                        "settings": settings,
                        "meeting": str(meeting),
                    }
                    for rank in range(family.ranks)
                ]
            )
            yield ranks
            ranks.call("close")


class _Rank(StreamRequestHandler):
    """Serves one rank, in a process of its own. What it raises goes to the log, and ends it."""

    def handle(self) -> None:
        setup = json.loads(self.rfile.readline())
        family = Family(**setup["family"])
        group = _meet(family, setup["rank"], setup["meeting"])
        model = Path(setup["model"])
        kind = DirectTree if setup["store"].get("direct") else RankTree
        tree = kind(family, model, setup["store"], setup["rank"], group, setup["settings"])
        self._answer("ready")
        for line in self.rfile:
            method, args = json.loads(line)
            self._answer(getattr(tree, method)(*args))

    def _answer(self, value: object) -> None:
        self.wfile.write(json.dumps(value).encode() + b"\n")


class _Server(ForkingMixIn, UnixStreamServer):
    pass


def _meet(family: Family, rank: int, meeting: str) -> Any:
    """The process group of all ranks; None for one alone."""
    from torch import distributed

    if family.ranks == 1:
        return None
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=family.ranks,
        timeout=timedelta(seconds=GROUP_SECONDS),
    )
    return distributed.new_group(list(range(family.ranks)), backend="gloo")


def main(path: str) -> None:
    """Serve ranks on a socket, which is there when SGLang is imported."""
    import sglang.srt.managers.schedule_batch
    import sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler
    import sglang.srt.mem_cache.unified_radix_cache  # noqa: F401
    import torch
    from sglang.srt.mem_cache.utils import get_hash_str
    from sglang.srt.plugins import load_plugins

    load_plugins()
    get_hash_str([0], None, 1)  # SGLang may have to compile it first
    torch.set_num_threads(1)  # threads would not be there in a fork
    with _Server(path, _Rank) as server:
        server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
