"""The two engines: keys, peer-sharing files, flags. Each has a store of its own and is the other's peer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

from examples.demo.server import PAGE_SIZE, Device
from lmcache_sglang.config import Config
from lmcache_sglang.peering import folder_of
from lmcache_sglang.storage.peers.keys import KeyFiles, KeyPair
from lmcache_sglang.testing.server import SGLangServer, free_port

STORE_SIZE = "1GiB"  # of shared memory, for each
MOST_TOKENS = 16384  # of each engine's own cache
HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Hardware:
    """What all engines here run with.

    Attributes:
        extra: more flags for SGLang; they win over those here.
    """

    model: Path
    device: Device
    extra: Sequence[str]
    logs: Path

    def server(self, name: str, flags: Sequence[str] = ()) -> SGLangServer:
        """An engine that is yet to be started."""
        common = ["--page-size", str(PAGE_SIZE), "--max-total-tokens", str(MOST_TOKENS)]
        common += ["--sleep-on-idle"]  # one engine mostly waits while the other works
        env = {"HF_HUB_OFFLINE": "1"}  # the model is a folder: nothing is to be fetched
        if self.device == "cpu":
            common += ["--device", "cpu", "--attention-backend", "torch_native"]
            common += ["--dtype", "float32"]  # equal prompts then have equal answers, cached or not
            env["SGLANG_USE_CPU_ENGINE"] = "1"
        args = [*common, *flags, *self.extra]
        log = self.logs / f"{name}.log"
        return SGLangServer(self.model, args=args, env=env, log_path=log, entry="serve")


class Pair:
    """A prefill and a decode engine on this machine, as on two.

    Args:
        folder: for keys, files and stores.
    """

    def __init__(self, hardware: Hardware, folder: Path) -> None:
        self._folder = folder
        self.events = f"tcp://{HOST}:{free_port()}"
        _make_files(folder, {name: free_port() for name in ("prefill", "decode")})
        # Routers are told what the engine has computed and what its store has taken of it.
        publish = json.dumps({"publisher": "zmq", "endpoint": self.events.replace(HOST, "*")})
        store = self._store_flags("prefill")
        self.prefill = hardware.server("prefill", [*store, "--kv-events-config", publish])
        self.decode = hardware.server("decode", self._store_flags("decode"))

    def start(self, timeout: float) -> None:
        with ThreadPoolExecutor() as both:
            list(both.map(lambda engine: engine.start(timeout), (self.prefill, self.decode)))

    def end(self) -> None:
        """Both engines and all that they have left."""
        self.prefill.kill()
        self.decode.kill()
        for name in ("prefill", "decode"):
            config = Config.of(self._settings(name))
            for memory in (config.cpu.directory(config.directory), folder_of(config)):
                shutil.rmtree(memory, ignore_errors=True)

    def _settings(self, name: str) -> dict[str, object]:
        return {
            "path": str(self._folder / name / "store"),
            "cpu": {"size": STORE_SIZE},
            "disk": {"size": 0},
            "restore": "always",  # also where a small model would compute as fast
            "peers": str(self._folder / name / "peers.yaml"),
        }

    def _store_flags(self, name: str) -> list[str]:
        settings = self._settings(name)
        return [
            *("--enable-hierarchical-cache", "--hicache-storage-backend", "lmcache"),
            *("--hicache-storage-backend-extra-config", json.dumps(settings)),
            *("--hicache-ratio", "2"),
            # A request waits for its prefix; the store keeps to deadlines of its own.
            *("--hicache-storage-prefetch-policy", "wait_complete"),
            "--enable-cache-report",
        ]


def _make_files(folder: Path, ports: Mapping[str, int]) -> None:
    """For each node a folder with its keys, as `lmcache-sglang keygen` makes them, and its peers.yaml."""
    keys = {name: KeyFiles.of(folder / name, name) for name in ports}
    for each in keys.values():
        each.write(KeyPair.new())
    for name, port in ports.items():
        peers = [
            {"name": other, "address": f"tcp://{HOST}:{at}", "key": str(keys[other].public)}
            for other, at in ports.items()
            if other != name
        ]
        own = {"name": name, "listen": f"tcp://{HOST}:{port}", "key": str(keys[name].secret)}
        file = folder / name / "peers.yaml"
        file.write_text(yaml.safe_dump({**own, "peers": peers}, sort_keys=False))
