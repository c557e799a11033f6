"""The modes of HiCache, each value in two combinations at least, and one workload that shows what each keeps.

    a cold engine   asks for FIRST twice, for ONCE once, and for more than the device holds
    a warm engine   asks for both, with nothing left but what the storage backend has on disk

What each promises (SGLang 0.5.23):

    write_through            stored as soon as it was computed
    write_through_selective  stored once it was asked for twice
    write_back               stored when the device evicts it; what was never evicted is lost
    buffer_only              the host pool holds only what is on its way; write_back becomes write_through
    wait_complete            all that is stored is restored
    timeout                  what is restored in time; here there is plenty
    best_effort              what was restored by the time that the engine has a place for the request:
                             nothing for one that never had to wait
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from .engine import Answer, Setup, ask, ask_at_once, flush, prompt, server
from .server import SGLangServer

FIRST, ONCE = prompt(1), prompt(2)
OTHERS = [prompt(seed) for seed in range(3, 9)]
PLENTY = {"prefetch_timeout_base": 60}  # seconds
ONE_AT_A_TIME = ("--max-running-requests", "1")


@dataclass(frozen=True, slots=True)
class Mode:
    """Flags of SGLang, by their values."""

    memory: str
    write: str
    prefetch: str
    layout: str
    overlap: bool
    page_size: int
    ranks: int = 1

    @property
    def args(self) -> list[str]:
        io_backend = "direct" if self.layout == "page_first_direct" else "kernel"
        ratio = "1.2" if self.memory == "buffer_only" else "4"
        return [
            *("--enable-hierarchical-cache",),
            *("--max-total-tokens", "2048", "--hicache-ratio", ratio),
            *("--hicache-host-memory-mode", self.memory),
            *("--hicache-write-policy", self.write),
            *("--hicache-storage-prefetch-policy", self.prefetch),
            *("--hicache-mem-layout", self.layout, "--hicache-io-backend", io_backend),
            *("--tp-size", str(self.ranks)),
            *(() if self.overlap else ("--disable-overlap-schedule",)),
            *(ONE_AT_A_TIME if self.prefetch == "best_effort" else ()),
        ]

    @property
    def keeps_once(self) -> bool:
        """Whether what was asked for once is stored."""
        return self.write != "write_through_selective"

    def __str__(self) -> str:
        """For a file's name."""
        overlap = "overlap" if self.overlap else "no-overlap"
        words = (self.memory, self.write, self.prefetch, self.layout, overlap)
        return "-".join((*words, f"page{self.page_size}", f"tp{self.ranks}"))


MODES = (
    Mode("cache", "write_through", "wait_complete", "page_first", True, 1),
    Mode("cache", "write_through_selective", "timeout", "page_first_direct", False, 16),
    Mode("cache", "write_back", "best_effort", "page_head", True, 64),
    Mode("cache", "write_back", "wait_complete", "page_first_direct", False, 64, ranks=2),
    Mode("buffer_only", "write_through", "timeout", "page_head", False, 64, ranks=2),
    Mode("buffer_only", "write_through_selective", "best_effort", "page_first", True, 16),
    Mode("buffer_only", "write_back", "wait_complete", "page_first_direct", True, 1),
)


@dataclass(frozen=True, slots=True)
class Run:
    """The answers of both engines, by the prompt's name, and what both logged."""

    cold: dict[str, Answer]
    warm: dict[str, Answer]
    log: str

    @property
    def restored(self) -> int:
        """Tokens."""
        return sum(answer.storage for answer in self.warm.values())

    @property
    def same(self) -> bool:
        """Whether both engines gave the same tokens."""
        return all(self.warm[name].tokens == self.cold[name].tokens for name in self.warm)


def run(model: Path, setup: Setup, mode: Mode, logs: Path) -> Run:
    """The workload. Args: setup: store and backend; its flags are the mode's."""
    setup = replace(setup, args=mode.args, page_size=mode.page_size, sglang=PLENTY)
    with server(model, setup, logs / f"{setup.backend} {mode} cold.log") as engine:
        cold = {"first": ask(engine, FIRST), "once": ask(engine, ONCE)}
        ask(engine, FIRST)
        for other in OTHERS:  # so that the device evicts
            ask(engine, other)
        flush(engine)  # once all of it is stored
        log = engine.log
    setup.forget_memory()
    with server(model, setup, logs / f"{setup.backend} {mode} warm.log") as engine:
        warm = {"first": _restored(engine, FIRST, mode), "once": _restored(engine, ONCE, mode)}
        return Run(cold, warm, log + engine.log)


def _restored(engine: SGLangServer, request: list[int], mode: Mode) -> Answer:
    if mode.prefetch != "best_effort":
        return ask(engine, request)
    return ask_at_once(engine, [prompt(99), request])[1]  # it waits for the one before it
