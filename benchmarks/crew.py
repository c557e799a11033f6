"""The harness's side of a subject: its workers, driven by one request at a time."""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks.catalog import CACHE, Spec
from benchmarks.wire import Message, receive, send

LOGS = CACHE / "logs"
DEADLINE = 300.0  # seconds for one request
END_SECONDS = 20.0  # for a worker to end by itself
HEAD_START = 0.01  # seconds between a timed request and the moment at which all workers begin


class CouldNotRun(Exception):
    """A subject failed; the report says so in these words."""


class _Process:
    """One worker process and its two pipes."""

    def __init__(self, spec: Spec, rank: int, deadline: float) -> None:
        self._deadline = deadline
        LOGS.mkdir(parents=True, exist_ok=True)
        self._log = LOGS / f"{spec.slug}-{rank}.log"
        their_reading, our_writing = os.pipe()
        our_reading, their_writing = os.pipe()
        module = f"benchmarks.subjects.{spec.module}"
        command = [str(spec.python), "-m", "benchmarks.worker", module, spec.kind]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, str(their_reading), str(their_writing)],
                pass_fds=(their_reading, their_writing),
                env={**os.environ, **spec.environment()},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        os.close(their_reading)
        os.close(their_writing)
        self._requests: IO[str] = os.fdopen(our_writing, "w")
        self._answers: IO[str] = os.fdopen(our_reading, "r")

    def wait_ready(self) -> None:
        self.receive()

    def send(self, request: Message) -> None:
        try:
            send(self._requests, request)
        except BrokenPipeError as error:
            raise CouldNotRun(self._last_words()) from error

    def receive(self) -> Message:
        ready, _, _ = select.select([self._answers], [], [], self._deadline)
        if not ready:
            raise CouldNotRun(f"no answer in {self._deadline:.0f} s")
        message = receive(self._answers)
        if message is None:
            raise CouldNotRun(self._last_words())
        if "error" in message:
            raise CouldNotRun(str(message["error"]))
        answer: Message = message.get("answer", {})
        return answer

    def hang_up(self) -> None:
        """No more requests. It stops its servers and ends by itself."""
        for stream in (self._requests, self._answers):
            try:
                stream.close()
            except BrokenPipeError:
                continue  # it is gone already

    def end(self) -> None:
        self.hang_up()
        try:
            self._process.wait(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _last_words(self) -> str:
        try:
            status = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "it closed its pipe"
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f"it ended with status {status}: {lines[-1] if lines else 'without a word'}"


@dataclass(frozen=True)
class Size:
    """What one worker of a crew is given."""

    page_bytes: int
    pages: int
    batch_pages: int


class Crew:
    """Workers of one subject on one directory.

    Raises:
        CouldNotRun: by every call; then only `end` makes sense.
    """

    def __init__(
        self,
        spec: Spec,
        size: Size,
        directory: Path,
        workers: int = 1,
        deadline: float = DEADLINE,
    ) -> None:
        self.spec = spec
        self.size = size
        self.workers = workers
        self._directory = directory
        self._processes = [_Process(spec, rank, deadline) for rank in range(workers)]

    @property
    def bytes(self) -> int:
        """Moved by one timed call, by all workers together."""
        return self.size.page_bytes * self.size.pages * self.workers

    def wait_ready(self) -> None:
        """Until each worker has imported its subject."""
        for process in self._processes:
            process.wait_ready()

    def open(self) -> Message:
        """Open the store in every worker; what the first one says of it."""
        self._directory.mkdir(parents=True, exist_ok=True)
        self.wait_ready()
        address = self._ask(self._processes[:1], "serve", **self._options(0, {}))[0]
        answers = []
        for rank, process in enumerate(self._processes):
            options = self._options(rank, address)
            answers += self._ask([process], "open", split=self.spec.split, **options)
        return answers[0]

    def _options(self, rank: int, service: Message) -> Message:
        return {
            "directory": str(self._directory),
            "page_bytes": self.size.page_bytes,
            "pages": self.size.pages,
            "workers": self.workers,
            "rank": rank,
            "threads": self.spec.threads,
            "service": service,
        }

    def begin(self, name: str) -> Message:
        """New pages in every worker, under keys of its own."""
        for rank, process in enumerate(self._processes):
            request = {
                "call": "begin",
                "name": f"{name}/{rank}",
                "batch_pages": self.size.batch_pages,
            }
            process.send(request)
        answers = [process.receive() for process in self._processes]
        return answers[0]

    def do(self, call: str, **arguments: object) -> list[Message]:
        """Something that is not timed."""
        return self._ask(self._processes, call, **arguments)

    def time(self, call: str, **arguments: object) -> float:
        """Seconds from the first worker's start to the last one's end."""
        at = time.monotonic() + HEAD_START
        answers = self._ask(self._processes, call, at=at, **arguments)
        return float(max(a["end"] for a in answers) - min(a["start"] for a in answers))

    def hang_up(self) -> None:
        """Tell all workers to end, without waiting for it."""
        for process in self._processes:
            process.hang_up()

    def end(self) -> None:
        self.hang_up()
        for process in self._processes:
            process.end()

    @staticmethod
    def _ask(processes: Sequence[_Process], call: str, **arguments: object) -> list[Message]:
        for process in processes:
            process.send({"call": call, **arguments})
        return [process.receive() for process in processes]


def in_turn(
    crews: Mapping[str, Crew],
    action: Callable[[Crew], object],
    turn: int,
    failed: Callable[[str, str], None],
) -> None:
    """Do it with every crew, the first one being another in each turn.

    Args:
        failed: told the name of a crew that could not, and why; may take it out.
    """
    names = list(crews)
    turn %= max(1, len(names))
    for name in names[turn:] + names[:turn]:
        try:
            action(crews[name])
        except CouldNotRun as error:
            failed(name, str(error))
