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
    best_effort              nothing: a request takes what is there when the scheduler first looks at it
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from .engine import Answer, Setup, ask, flush, prompt, server
from .server import SGLangServer

FIRST, ONCE = prompt(1), prompt(2)
OTHERS = [prompt(seed) for seed in range(3, 9)]
PLENTY = {"prefetch_timeout_base": 60}  # seconds
ROUTE = "/hicache/storage-backend"


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
    """The answers of both engines, by the prompt's name, and what both logged.

    Attributes:
        later: of the warm engine, told at run time to wait_complete; where its own policy promises nothing.
    """

    cold: dict[str, Answer]
    warm: dict[str, Answer]
    later: dict[str, Answer]
    log: str

    @property
    def restored(self) -> int:
        """Tokens; where the policy promises nothing, what the engine gave back once it was told to wait."""
        return sum(answer.storage for answer in (self.later or self.warm).values())

    @property
    def right(self) -> dict[str, list[int]]:
        """The tokens of the cold engine."""
        return {name: answer.tokens for name, answer in self.cold.items()}

    @property
    def same(self) -> bool:
        """Whether both engines gave the same tokens."""
        right = self.right
        return all(
            answer.tokens == right[name]
            for answers in (self.warm, self.later)
            for name, answer in answers.items()
        )


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
        warm = {"first": ask(engine, FIRST), "once": ask(engine, ONCE)}
        later = _waiting(engine, setup) if mode.prefetch == "best_effort" else {}
        return Run(cold, warm, later, log + engine.log)


def _waiting(engine: SGLangServer, setup: Setup) -> dict[str, Answer]:
    """The same backend attached again changes the policy only."""
    flush(engine)
    policy = {"hicache_storage_prefetch_policy": "wait_complete"}
    engine.put(ROUTE, {"hicache_storage_backend": setup.backend, **policy})
    return {"first": ask(engine, FIRST), "once": ask(engine, ONCE)}
