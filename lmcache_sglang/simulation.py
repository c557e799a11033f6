"""Which of a trace's requests a cache would have served, by its size and policy, without an engine.

A trace is JSON, a request a line, as Mooncake's (FAST '25) are: `hash_ids` are the ids of the blocks of a prompt, in their
order; equal ids mean equal prefixes up to and with that block. `timestamp` is when it came, in milliseconds, and may be left out.
Other keys are not read. The caches are native
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


@dataclass(frozen=True, slots=True)
class Speeds:
    """Of a model on a machine, both for one request at a time.

    Attributes:
        compute: tokens of a prompt that the engine computes in a second.
        load: bytes of pages that come back in a second.
    """

    compute: float
    load: float

    def saved_seconds(self, block_tokens: int, block_bytes: int) -> float:
        """By loading a block instead of computing it; negative where computing is faster."""
        return block_tokens / self.compute - block_bytes / self.load


class _Request(msgspec.Struct):
    hash_ids: list[int | str]
    timestamp: float | msgspec.UnsetType = msgspec.UNSET


class Trace:
    """Requests, in their order.

    Attributes:
        requests: their count.
        blocks: of all of them.
        distinct: different blocks, and so the room of a cache that never gives one up.
        seconds: from the first request to the last; 0 where the trace does not say when they came.
    """

    def __init__(self, requests: Sequence[Sequence[int | str]], seconds: float = 0.0) -> None:
        numbers: dict[int | str, int] = {}
        blocks, ends = array("I"), array("Q")
        for request in requests:
            blocks.extend([numbers.setdefault(block, len(numbers)) for block in request])
            ends.append(len(blocks))
        self.requests = len(ends)
        self.blocks = len(blocks)
        self.distinct = len(numbers)
        self.seconds = seconds
        self._native = _native.SimulatedTrace(blocks.tobytes(), ends.tobytes())

    @classmethod
    def read(cls, path: Path) -> Trace:
        """Raises: TraceError: the file, or a line of it, is no trace."""
        decoder = msgspec.json.Decoder(_Request)
        requests, times = [], []
        try:
            with path.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        request = _decoded(decoder, line, f"{path}, line {number}")
                        requests.append(request.hash_ids)
                        times.append(request.timestamp)
        except OSError as error:
            raise TraceError(f"{path} cannot be read: {error.strerror}") from error
        if not any(requests):
            raise TraceError(f"{path} has no request with a block")
        return cls(requests, _span(times))

    def simulate(self, policy: str, blocks: int) -> Simulated:
        """Replay it. Args: policy: one of `POLICIES`. blocks: that the cache has room for. Raises: ValueError."""
        begun = time.perf_counter()
        references, hits, written = _native.simulate(self._native, blocks, policy)
        seconds = time.perf_counter() - begun
        return Simulated(policy, blocks, hits / references, hits, references, written, seconds)


def _span(times: Sequence[float | msgspec.UnsetType]) -> float:
    """Seconds from the first to the last; 0 where one is not known."""
    known = [time for time in times if time is not msgspec.UNSET]
    return (max(known) - min(known)) / 1000 if len(known) == len(times) else 0.0


def _decoded(decoder: msgspec.json.Decoder[_Request], line: bytes, place: str) -> _Request:
    """Raises: TraceError."""
    try:
        return decoder.decode(line)
    except msgspec.DecodeError as error:
        raise TraceError(
            f"{place} is no request: {error}; expected is one JSON object a line with hash_ids"
        ) from error
