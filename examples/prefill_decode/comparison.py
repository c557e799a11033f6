"""The same requests to one engine alone and to the pair."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from examples.demo.errors import DemoFailed
from examples.demo.progress import Progress
from examples.demo.workload import warm_up
from examples.prefill_decode.client import Reply, ask
from examples.prefill_decode.pair import Hardware, Pair
from examples.prefill_decode.proxy import Proxy, Settings
from examples.prefill_decode.report import Report, Row
from examples.prefill_decode.serving import served
from examples.prefill_decode.workload import Question, Workload
from lmcache_sglang.testing.server import SGLangServer

ACQUAINTED_SECONDS = 60.0  # that the two nodes may take to find each other


@dataclass(frozen=True, slots=True)
class Comparison:
    """Plays a workload to both."""

    hardware: Hardware
    workload: Workload
    new_tokens: int
    start_timeout: float
    progress: Progress

    def run(self, folder: Path) -> Report:
        alone = self._alone()
        paired = self._paired(folder)
        return Report(
            [Row(q, *replies) for q, *replies in zip(self._all, alone, paired, strict=True)]
        )

    @property
    def _all(self) -> list[Question]:
        return [*self.workload.questions, self.workload.alone]

    def _alone(self) -> list[Reply]:
        with self._running(self.hardware.server("alone")) as engine:
            ask(engine.url, _warm_up("alone"), self.new_tokens)
            return [self._ask("alone", engine.url, question) for question in self._all]

    @contextmanager
    def _running(self, engine: SGLangServer) -> Iterator[SGLangServer]:
        with self.progress.stage("one engine alone: starting"):
            engine.start(self.start_timeout)
        try:
            yield engine
        finally:
            engine.kill()

    def _paired(self, folder: Path) -> list[Reply]:
        pair = Pair(self.hardware, folder)
        try:
            with self.progress.stage("prefill and decode engine: starting"):
                pair.start(self.start_timeout)
            settings = Settings(pair.prefill.url, pair.decode.url, pair.events)
            with served(Proxy(settings).app) as url:
                with self.progress.stage("the two nodes find each other"):
                    self._get_acquainted(url)
                replies = [self._ask("pair", url, each) for each in self.workload.questions]
                with self.progress.stage("the prefill engine is killed"):
                    pair.prefill.kill()
                return [*replies, self._ask("pair", url, self.workload.alone)]
        finally:
            pair.end()

    def _get_acquainted(self, url: str) -> None:
        """Ask until a prompt has crossed. Raises: DemoFailed."""
        deadline, number = time.monotonic() + ACQUAINTED_SECONDS, 0
        while not ask(url, _warm_up(f"pair {number}"), self.new_tokens).cached.storage:
            number += 1
            if time.monotonic() > deadline:
                raise DemoFailed("the decode engine gets no page from the prefill engine")

    def _ask(self, whom: str, url: str, question: Question) -> Reply:
        with self.progress.stage(f"{whom}: {question.name}") as stage:
            reply = ask(url, question.prompt, self.new_tokens)
            stage.note = reply.outcome
        return reply


def _warm_up(name: str) -> str:
    return warm_up(name)[0]["content"]
