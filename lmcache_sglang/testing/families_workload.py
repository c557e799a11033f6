"""One workload for every family of models: a cold engine is asked, then one that has the disk alone.

A recurrent state is of one place in a sequence, so a prefix comes back up to a place where SGLang kept
one: where a prompt or its answer ended. The requests here therefore go on from what was asked before,
but for `PART`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from .engine import NEW_TOKENS, PAGE_SIZE, Answer, Setup, ask, flush, prompt, server
from .server import SGLangServer
from .tiny_families import WINDOW

# Every prefix is worth a look-up, and the first request after a start waits for its own.
EAGER = {"prefetch_threshold": 16}
# Only this store's flag turns HiCache on by itself.
POOLS = ("--enable-hierarchical-cache", "--max-total-tokens", "1024", "--hicache-ratio", "2")
WAIT = ("--hicache-storage-prefetch-policy", "wait_complete")
RECURRENT = frozenset({"mamba", "conv"})
# All that SGLang offers on CPU: no snapshots inside a prompt, hence pages of one token.
STATES_AT_ENDS = ("--mamba-radix-cache-strategy", "no_buffer", "--disable-overlap-schedule")

LONG = prompt(1)
ASKED = {
    "longer than a window": LONG,
    "shorter than a window": prompt(3, WINDOW - 30),
    "of the same stem": LONG[:208] + prompt(2)[208:300],
    "a third end on the stem": LONG[:208] + prompt(4)[208:330],
}
ONE_MORE = 7  # a token
PART = LONG[:250]  # ends where nothing ended before
EVICTED = "left device and host"
OTHERS = [prompt(seed) for seed in range(50, 60)]  # 4,000 tokens: more than device and host hold


@dataclass(frozen=True, slots=True)
class Service:
    """How a family of `tiny_families.FAMILIES` is served."""

    family: str
    memory: str = "cache"
    page_size: int = PAGE_SIZE
    ranks: int = 1

    @property
    def args(self) -> list[str]:
        return [
            *POOLS,
            *WAIT,
            *("--hicache-host-memory-mode", self.memory),
            *("--tp-size", str(self.ranks)),
            *(STATES_AT_ENDS if self.family in RECURRENT else ()),
        ]

    def setup(self, setup: Setup) -> Setup:
        """The same store and backend, served so."""
        return replace(setup, args=self.args, page_size=self.page_size, sglang=EAGER)

    @property
    def asked(self) -> int:
        """Tokens of the warm engine's requests that the cold one computed, in whole pages."""
        known = [len(tokens) for tokens in ASKED.values()]
        known.append(len(PART) - 1)  # SGLang computes the last token of each request
        known.append(len(LONG) + NEW_TOKENS - 1)  # the last token of an answer is never computed
        known.append(len(LONG))  # EVICTED
        return sum(tokens // self.page_size * self.page_size for tokens in known)

    def __str__(self) -> str:
        """For a file's name."""
        return f"{self.family}-{self.memory}-page{self.page_size}-tp{self.ranks}"


SERVICES = (
    Service("mha"),
    Service("swa"),
    Service("mla"),
    Service("mamba", page_size=1),
    Service("conv", page_size=1),
    Service("swa", memory="buffer_only"),
    Service("mha", ranks=2),
    Service("swa", ranks=2),
    Service("mla", ranks=2),
    Service("mha", page_size=1, ranks=2),
)


@dataclass(frozen=True, slots=True)
class Cold:
    """What an engine with an empty store answered.

    Attributes:
        answered: to `ASKED`.
        expected: to the requests of the warm engine, with nothing cached for any of them.
    """

    answered: dict[str, Answer]
    expected: dict[str, Answer]
    log: str


@dataclass(frozen=True, slots=True)
class Run:
    """The answers of both engines, by the request's name."""

    cold: Cold
    warm: dict[str, Answer]

    @property
    def restored(self) -> int:
        """Tokens."""
        return sum(answer.storage for answer in self.warm.values())

    @property
    def right(self) -> dict[str, list[int]]:
        """The tokens of an engine that computed everything."""
        return {name: answer.tokens for name, answer in self.cold.expected.items()}

    @property
    def same(self) -> bool:
        """Whether the warm engine gave the tokens of one that computed everything."""
        computed = all(
            answer.device == answer.host == answer.storage == 0
            for answer in self.cold.expected.values()
        )
        return computed and self.right == {n: answer.tokens for n, answer in self.warm.items()}


def run(model: Path, setup: Setup, service: Service, logs: Path) -> Run:
    """The workload. Args: setup: store and backend; its flags are the service's."""
    setup = service.setup(setup)
    name = f"{setup.backend} {service}"
    cold = ask_cold(model, setup, logs / f"{name} cold.log")
    with server(model, setup, logs / f"{name} warm.log") as engine:
        return Run(cold, _ask_again(engine, cold.answered))


def ask_cold(model: Path, setup: Setup, log: Path) -> Cold:
    """Fill an empty store; on return the engine is gone, and of the store only the disk is left."""
    with server(model, setup, log) as engine:
        answered = {what: ask(engine, tokens) for what, tokens in ASKED.items()}
        # A tenant for each, so that nothing is cached for any of them.
        expected = {
            what: ask(engine, tokens, cache_salt=what) for what, tokens in later(answered).items()
        }
        flush(engine)  # once all of it is stored
    setup.forget_memory()
    return Cold(answered, expected, engine.log)


def later(answered: dict[str, Answer]) -> dict[str, list[int]]:
    """The requests of the warm engine."""
    again = {what: [*tokens, ONE_MORE] for what, tokens in ASKED.items()}
    return again | {
        "a part": PART,
        "a turn later": a_turn_later(answered),
        EVICTED: [*LONG, ONE_MORE],
    }


def a_turn_later(answered: dict[str, Answer]) -> list[int]:
    """The next turn of a chat: what was asked, what was answered, and something new."""
    return LONG + answered["longer than a window"].tokens + prompt(7)[:50]


def ask_evicted(engine: SGLangServer) -> Answer:
    """What is answered to a prompt once others have driven it out of device and host."""
    flush(engine)
    for tokens in ([*LONG, ONE_MORE], *OTHERS):
        ask(engine, tokens)
    return ask(engine, [*LONG, ONE_MORE])


def _ask_again(engine: SGLangServer, answered: dict[str, Answer]) -> dict[str, Answer]:
    """Each with nothing on device and host."""
    warm = {}
    for what, tokens in later(answered).items():
        flush(engine)
        warm[what] = ask_evicted(engine) if what == EVICTED else ask(engine, tokens)
    return warm
