"""What is shown while one waits: a line that moves on a terminal, one line a stage elsewhere."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

REDRAW_SECONDS = 0.25


class Stage:
    """One thing being waited for. `note` is added to its line once it is over."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.note = ""
        self._begun = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun


class Progress:
    """Writes stages to `stream`; how depends on whether that is a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live = stream.isatty()

    def say(self, text: str) -> None:
        """A line of its own, between stages."""
        print(text, file=self._stream, flush=True)

    @contextmanager
    def stage(self, title: str) -> Iterator[Stage]:
        stage = Stage(title)
        outcome = "failed after "
        self._write(f"  {title} ... ")
        try:
            with self._redrawn(stage):
                yield stage
            outcome = ""
        finally:
            start = f"\r\x1b[K  {title} ... " if self._live else ""
            note = f"  {stage.note}" if stage.note else ""
            self._write(f"{start}{outcome}{stage.seconds:.1f} s{note}\n")

    @contextmanager
    def _redrawn(self, stage: Stage) -> Iterator[None]:
        """A terminal's line is redrawn by a thread: whoever waits is blocked in a read."""
        if not self._live:
            yield
            return
        over = threading.Event()
        painter = threading.Thread(target=self._repaint, args=(stage, over), daemon=True)
        painter.start()
        try:
            yield
        finally:
            over.set()
            painter.join()

    def _repaint(self, stage: Stage, over: threading.Event) -> None:
        while not over.wait(REDRAW_SECONDS):
            line = f"  {stage.title} ... {stage.seconds:.0f} s"
            self._write("\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1])

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
