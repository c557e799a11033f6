"""A process of its own over a disk tier's directory: to share it with, to pause, and to lose.

    with DiskProcess() as other:
        other.ask("open", path=str(path), size=size)
        assert other.ask("put", numbers=[1, 2]) == ["stored", "stored"]

What may end the process (`try_out`, `die_writing`) runs in a fork of it and is reported like anything
else. The page of a number is `page_of(number)`, here and there.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from ..errors import ConfigError, Reason, TierError
from ..storage.base import Lookup, Stored
from ..storage.chain import Chain
from ..storage.cpu import CpuTier
from ..storage.disk import environment, layout, probe
from ..storage.disk.tier import DiskTier
from .tier_suite import ROOMY, EngineMemory, a_key, bytes_of, read_pages, write_pages

SIZES = [100, 1500, 3000, 5000, 20_000, 65_536, 70_001]  # in LMDB's leaves, and beside them
FRESH = range(1_000_000, 1_000_020)  # numbers that `try_out` writes
LARGEST_BATCH = 24
FLUSH_SECONDS = 30.0


def page_of(number: int) -> tuple[bytes, bytes]:
    """The key and the bytes of a page."""
    key = a_key(number)
    return key, bytes_of(key, SIZES[number % len(SIZES)])


class DiskProcess:
    """The parent's side. Errors of the tier are raised here as they were there."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", __name__]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, what: str, **arguments: object) -> Any:
        requests, answers = self._pipes()
        print(json.dumps([what, arguments]), file=requests, flush=True)
        line = answers.readline()
        assert line, f"the process ended: {self._process.wait()}"
        match json.loads(line):
            case ["answer", answer]:
                return answer
            case ["ConfigError", setting, problem]:
                raise ConfigError(setting, problem)
            case ["TierError", tier, reason, detail]:
                raise TierError(tier, Reason(reason), detail)
        raise AssertionError(line)

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it at once, and return when it is gone."""
        self._process.kill()
        self._process.wait()

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self._process.stdin is not None and self._process.stdout is not None
        return self._process.stdin, self._process.stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        for pipe in self._pipes():
            pipe.close()


# From here on: the other side.


class _Served:
    """Each public method answers the request of its name."""

    _tier: DiskTier

    def open(self, path: str, size: int) -> int:
        self._tier = DiskTier(Path(path), size)
        return self._tier.capacity

    def close(self) -> None:
        self._tier.close()

    def put(self, numbers: list[int]) -> list[str]:
        return [stored.value for stored in _put(self._tier, numbers)]

    def get(self, numbers: list[int]) -> list[str]:
        return [lookup.value for lookup in _get(self._tier, numbers)]

    def read_for_ever(self) -> bool:
        """Begin to read, and never end; whoever asked may kill this process now."""
        self._reading = self._tier._env.read()
        self._reading.__enter__()
        return True

    def write_for_ever(self) -> bool:
        """Begin to write, and never end."""
        self._writing = self._tier._env.write()
        self._writing.__enter__()
        return True

    def remove(self, numbers: list[int]) -> int:
        return self._tier.remove([a_key(number) for number in numbers])

    def used(self) -> int:
        return self._tier.stats().bytes

    def become_nobody(self) -> None:
        """Give up root, which may write anywhere."""
        os.setgid(65_534)
        os.setuid(65_534)

    def try_out(self, path: str, size: int, numbers: list[int]) -> dict[str, Any]:
        """Use a store that may be damaged, for all that a tier can do.

        Returns:
            ``refused``: the setting that was named; ``died``: the signal; ``raised``: what should not
            have been; or ``used``: the outcomes of the pages, counted.
        """
        return _in_fork(lambda: _try_out(Path(path), size, numbers))

    def die_writing(self, path: str, size: int, first: int, batches: int) -> int:
        """Write pages from number `first` on, and be killed some time after so many flushes.

        Returns:
            The number after the last one whose flush was confirmed.
        """
        done, confirm = os.pipe()
        writer = os.fork()
        if not writer:
            _write_for_ever(Path(path), size, first, confirm)
        os.close(confirm)
        after = first
        with os.fdopen(done) as lines:
            for _ in range(batches):
                after = int(lines.readline())
            time.sleep(random.Random(first).random() * 0.006)  # any moment of the next write
            os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        return after


def _put(tier: DiskTier, numbers: list[int]) -> list[Stored]:
    pages = [page_of(number) for number in numbers]
    return tier.put(
        [key for key, _ in pages], EngineMemory([content for _, content in pages]).segments
    )


def _get(tier: DiskTier, numbers: list[int]) -> list[Lookup]:
    return read_pages(tier, [page_of(number) for number in numbers])


def _write_for_ever(path: Path, size: int, first: int, confirm: int) -> None:
    chain = Chain(CpuTier(ROOMY), DiskTier(path, size), spill_bytes=ROOMY)
    for batch in _batches(first):
        pages = [page_of(number) for number in batch]
        memory = EngineMemory([content for _, content in pages])
        chain.put([key for key, _ in pages], memory.segments)
        if not chain.flush(FLUSH_SECONDS):
            os._exit(1)
        os.write(confirm, f"{batch.stop}\n".encode())


def _batches(first: int) -> Iterator[range]:
    rng = random.Random(first)
    while True:
        batch = range(first, first + rng.randint(1, LARGEST_BATCH))
        yield batch
        first = batch.stop


def _try_out(path: Path, size: int, numbers: list[int]) -> dict[str, Any]:
    try:
        tier = DiskTier(path, size)
    except ConfigError as error:
        return {"refused": error.setting}
    seen: Counter[str] = Counter()

    def read_all() -> None:
        for start in range(0, len(numbers), 10):
            seen.update(lookup.value for lookup in _get(tier, numbers[start : start + 10]))

    steps: list[Callable[[], object]] = [
        read_all,
        tier.check,
        lambda: write_pages(tier, [page_of(number) for number in FRESH]),
        read_all,
        lambda: tier.remove([a_key(number) for number in FRESH]),
        lambda: tier.check(repair=True),
        read_all,
        tier.close,
    ]
    for step in steps:
        try:
            step()
        except TierError as error:
            seen[f"error {error.reason}"] += 1
    return {"used": seen}


def _in_fork(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do it where dying of it, or never ending, costs nothing."""
    answer, give = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(60)
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - the test reports it
            result = {"raised": f"{type(error).__name__}: {error}"}
        with os.fdopen(give, "w") as out:
            json.dump(result, out)
        os._exit(0)
    os.close(give)
    with os.fdopen(answer) as lines:
        text = lines.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return {"died": signal.Signals(os.WTERMSIG(status)).name}
    found: dict[str, Any] = json.loads(text)
    return found


def _probe_in_fork(file: Path) -> dict[str, str]:
    """As environment.py does it, without the start of an interpreter: hundreds are run here."""
    found = _in_fork(lambda: dict(probe.inspect(str(file), layout.EXPECTED)))
    if "died" in found or "raised" in found:
        return probe.verdict("damaged", str(found))
    return found


def main() -> None:
    environment._probe = _probe_in_fork
    served = _Served()
    for line in sys.stdin:
        what, arguments = json.loads(line)
        try:
            reply = ["answer", getattr(served, what)(**arguments)]
        except ConfigError as error:
            reply = ["ConfigError", error.setting, error.problem]
        except TierError as error:
            reply = ["TierError", error.tier, error.reason, error.detail]
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
