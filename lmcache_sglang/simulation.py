"""Which of a trace's requests a cache would have served, by its size and policy, without an engine.

A trace is JSON, a request a line, as Mooncake's (FAST '25) are: `hash_ids` are the ids of the blocks of a prompt, in their
order; equal ids mean equal prefixes up to and with that block. Other keys are not read. The caches are native
(storage/csrc/simulation.hpp).
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from .errors import TraceError
from .storage import _native

POLICIES: tuple[str, ...] = tuple(_native.simulated_policies())


@dataclass(frozen=True, slots=True)
class Simulated:
    """How a cache did.

    Attributes:
        blocks: that it had room for.
        hit_rate: of all blocks of all requests, those in a prefix that was there.
        written_blocks: those that were put into it, each of which a disk would have had to write.
        seconds: that the simulation took.
    """

    policy: str
    blocks: int
    hit_rate: float
    hit_blocks: int
    request_blocks: int
    written_blocks: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class _Request(msgspec.Struct):
    hash_ids: list[int | str]


class Trace:
    """Requests, in their order.

    Attributes:
        requests: their count.
        blocks: of all of them.
        distinct: different blocks, and so the room of a cache that never gives one up.
    """

    def __init__(self, requests: Sequence[Sequence[int | str]]) -> None:
        numbers: dict[int | str, int] = {}
        blocks, ends = array("I"), array("Q")
        for request in requests:
            blocks.extend([numbers.setdefault(block, len(numbers)) for block in request])
            ends.append(len(blocks))
        self.requests = len(ends)
        self.blocks = len(blocks)
        self.distinct = len(numbers)
        self._native = _native.SimulatedTrace(blocks.tobytes(), ends.tobytes())

    @classmethod
    def read(cls, path: Path) -> Trace:
        """Raises: TraceError: the file, or a line of it, is no trace."""
        decoder = msgspec.json.Decoder(_Request)
        requests = []
        try:
            with path.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        requests.append(_decoded(decoder, line, f"{path}, line {number}"))
        except OSError as error:
            raise TraceError(f"{path} cannot be read: {error.strerror}") from error
        if not any(requests):
            raise TraceError(f"{path} has no request with a block")
        return cls(requests)

    def simulate(self, policy: str, blocks: int) -> Simulated:
        """Replay it. Args: policy: one of `POLICIES`. blocks: that the cache has room for. Raises: ValueError."""
        begun = time.perf_counter()
        references, hits, written = _native.simulate(self._native, blocks, policy)
        seconds = time.perf_counter() - begun
        return Simulated(policy, blocks, hits / references, hits, references, written, seconds)


def _decoded(decoder: msgspec.json.Decoder[_Request], line: bytes, place: str) -> list[int | str]:
    """Raises: TraceError."""
    try:
        return decoder.decode(line).hash_ids
    except msgspec.DecodeError as error:
        raise TraceError(
            f"{place} is no request: {error}; expected is one JSON object a line with hash_ids"
        ) from error
