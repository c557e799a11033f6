"""The workers' side: threads that bring pages from the store into blocks, and blocks into the store.

One thread for loads and one for saves, so that neither waits for the other, and one that copies loaded pages to blocks
while the next ones are read. vLLM keeps the blocks of a job as they are until it is told that the job is done with them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import gcd
from threading import Condition, local
from typing import TYPE_CHECKING

import torch

from ..hicache.assembly import fill_gaps
from ..hicache.form import PageForm
from ..kernels.pages import PageSegments
from ..storage.base import Limits
from .block_memory import Pieces
from .jobs import Done, Job, Renamed, Replaced
from .lane import Lane, Move
from .stage import Copier, Copies, Stage, span_bytes, spans
from .statistics import Statistics

if TYPE_CHECKING:
    from ..hicache.stored_pool import Standing
    from ..storage.chain import Chain
    from .block_memory import BlockMemory
    from .groups import Group
    from .knowledge import Knowledge

logger = logging.getLogger(__name__)

LOAD_SECONDS = 30.0  # that a load may take; what did not come is computed
HANG_SECONDS = (
    10.0  # beyond that, or in a save since the last pages, after which nobody waits any more
)
SAVE_SECONDS = 30.0  # that the store may take for a save's pages of one stage
CLOSE_SECONDS = 60.0
SLEEP_SECONDS = 30.0
LOOK_EVERY_SECONDS = 1.0

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Part:
    """One group of a worker.

    Attributes:
        at: its place among the groups.
        block_size: tokens of the blocks that its memory has.
        saves: whether this worker does; of what every rank holds whole, one of them.
    """

    at: int
    group: Group
    memory: BlockMemory
    block_size: int
    saves: bool


@dataclass
class Loaded:
    """Loads that have ended since the last look: requests, and those blocks that hold nothing."""

    requests: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    bad_blocks: set[int] = field(default_factory=set)


class Mover:
    """Of one worker.

    Args:
        rank: of it.
        computed: gives what waits for all that the engine has begun by then (block_memory.py `computed_on`).
        device: of the blocks; a GPU is to reach the memory of pages on their way.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        rank: int,
        knowledge: Knowledge,
        chain: Chain,
        *,
        computed: Callable[[], Callable[[], None]],
        device: torch.device = _CPU,
    ) -> None:
        self._parts = parts
        self._rank = rank
        self._knowledge = knowledge
        self._chain = chain
        self._computed = computed
        self._device = device
        self._changed = Condition()
        self._open: dict[int, tuple[Move, Lane]] = {}  # by the move's id; all that are not over
        self._copying: set[int] = set()  # those of saves that need their blocks still
        self._loaded = Loaded()
        self._done = Done()
        self._counted = Statistics()
        self._faults: dict[str, int] = {}
        self._look_again = float("-inf")
        pages = [knowledge.standing(part.at, rank).kind.page for part in parts]
        self._half_bytes = max((span_bytes(page.page_bytes) for page in pages), default=0)
        self._stages = local()
        self._copier = Copier("lmcache-copy")
        self._step = 0  # the number of the last one
        self._replaced = Replaced(0 if knowledge.lasting else 1, after=0)
        self._named = 0  # of those
        self._loads = Lane("lmcache-load", self._load, begin=self._stage)
        self._saves = Lane("lmcache-save", self._save, begin=self._stage)

    # On the engine's thread.

    def begin_step(self, number: int) -> None:
        self._step = number

    def drop_saves(self) -> None:
        for move, lane in list(self._open.values()):
            if lane is self._saves:
                self._give_up(move, lane)

    def load(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._give(self._loads, job)

    def save(self, jobs: Sequence[Job]) -> None:
        wait = self._computed() if jobs else None
        for job in jobs:
            self._give(self._saves, job, wait)

    def loaded(self, *, wait: float = 0.0) -> Loaded:
        """Loads that have ended. Args: wait: seconds for anything under way to end, where there is nothing else to do."""
        self._leave_what_hangs()
        with self._changed:
            if wait and self._open:
                self._changed.wait_for(lambda: self._loaded.requests or self._done, wait)
            loaded, self._loaded = self._loaded, Loaded()
        return loaded

    def done(self) -> Done:
        with self._changed:
            done, self._done = self._done, Done()
        if self._replaced.count != self._named:
            done.replacements[self._rank] = self._replaced
        return done

    def counted(self) -> Statistics:
        """Since the last look. Faults are looked for once a second: this is asked in each step."""
        with self._changed:
            counted, self._counted = self._counted, Statistics()
        if time.monotonic() < self._look_again:
            return counted
        self._look_again = time.monotonic() + LOOK_EVERY_SECONDS
        faults = self._chain.faults.counts()
        counted.add_faults({name: faults[name] - self._faults.get(name, 0) for name in faults})
        self._faults = faults
        return counted

    def replaced(self) -> None:
        """The weights may not be what they were: nothing is moved until what they compute has a name."""
        self._replaced = Replaced(self._replaced.count + 1, self._step)

    def renamed(self, renamed: Renamed) -> None:
        self._knowledge.rename(renamed.weights)
        told = renamed.replacements.get(self._rank)
        self._named = 0 if told is None else told.count

    def sleeps(self) -> None:
        """The memory of the blocks may go: wait for what copies, and end the rest."""
        with self._changed:
            self._changed.wait_for(lambda: not self._needs_blocks(), SLEEP_SECONDS)
        for move, lane in list(self._open.values()):
            if id(move) in self._copying or lane is self._loads:
                self._give_up(move, lane)

    def close(self) -> None:
        """Returns when all saves that were given are done, or the store does not answer."""
        for move, lane in list(self._open.values()):
            if lane is self._loads:
                self._give_up(move, lane)  # nobody waits for it
        for lane in (self._loads, self._saves):
            if not lane.close(CLOSE_SECONDS):
                logger.warning("lmcache: the store does not answer; a thread is left alone")
        self._copier.close()

    def _give(self, lane: Lane, job: Job, wait: Callable[[], None] | None = None) -> None:
        standings = [self._knowledge.standing(part.at, self._rank) for part in self._parts]
        move = Move(job, standings, wait or _at_once)
        with self._changed:
            self._open[id(move)] = move, lane
            if lane is self._saves:
                self._copying.add(id(move))
        if self._replaced.count != self._named:
            self._give_up(move, lane)
        else:
            lane.give(move)

    def _needs_blocks(self) -> bool:
        loads = any(lane is self._loads for _, lane in self._open.values())
        return bool(self._copying) or loads

    def _leave_what_hangs(self) -> None:
        for lane, seconds in ((self._loads, LOAD_SECONDS), (self._saves, SAVE_SECONDS)):
            for move in lane.hanging(seconds + HANG_SECONDS):
                logger.warning(
                    "lmcache: the store has not answered for %.0f s: what was asked of it is %s",
                    time.monotonic() - move.begun,
                    "computed" if lane is self._loads else "not saved",
                )
                self._give_up(move, lane)  # unless that was done
                lane.replace()

    def _give_up(self, move: Move, lane: Lane) -> None:
        if lane is self._loads:
            self._end_load(move, move.job.tokens[0])
        else:
            self._end_save(move, stored=False)

    # On the lanes' threads.

    def _load(self, move: Move) -> None:
        job, good = move.job, move.job.tokens[0]
        begun = time.monotonic()
        limits = Limits.within(LOAD_SECONDS)
        try:
            reached = job.tokens[1]
            for part, standing in zip(self._parts, move.standings, strict=True):
                reached = min(reached, self._load_part(part, standing, move, limits))
            good = reached
        finally:
            self._end_load(move, good, time.monotonic() - begun)

    def _end_load(self, move: Move, good: int, seconds: float = 0.0) -> None:
        job = move.job
        if not move.end():
            return
        with self._changed:
            del self._open[id(move)]
            self._loaded.requests.add(job.request)
            self._counted.add(
                load_seconds=seconds,
                load_tokens=good - job.tokens[0],
                load_missed_tokens=job.tokens[1] - good,
            )
            if good < job.tokens[1]:
                self._loaded.failed.add(job.request)
                self._done.short[job.request] = good
                for part, blocks in zip(self._parts, job.blocks, strict=True):
                    size = part.group.block_size
                    first = job.tokens[0] // size
                    self._loaded.bad_blocks |= set(blocks[good // size - first :]) - {0}
            self._changed.notify_all()

    def _load_part(self, part: Part, standing: Standing, move: Move, limits: Limits) -> int:
        """Up to which token a group's blocks hold what they should."""
        job, form = move.job, PageForm.of(standing.kind.page)
        with Copies(self._copier) as copies:
            for pages in spans(_pages_with_blocks(part, job), form.page_bytes):
                records = self._stage().records(copies.half(), len(pages), form.page_bytes)
                here = self._read(part, standing, move, pages, records, limits)
                if here and not move.is_over:
                    loaded = range(pages.start, pages.start + here)
                    copies.begin(partial(self._copy, part, move, loaded, records, load=True))
                if here < len(pages) or move.is_over:
                    first_page = job.tokens[0] // job.page_size
                    return max(job.tokens[0], (first_page + pages.start + here) * job.page_size)
        return job.tokens[1]

    def _read(
        self,
        part: Part,
        standing: Standing,
        move: Move,
        pages: range,
        records: torch.Tensor,
        limits: Limits,
    ) -> int:
        """How many of these pages of a job, from the first one on, are in the records now."""
        job = move.job
        hashes = job.hashes[pages.start : pages.stop]
        before = job.hashes[pages.start - 1] if pages.start else job.before
        before = b"" if job.is_first and pages.start == 0 else before
        into = _rows(records)
        keys = [standing.namespace + each for each in hashes]
        parent = standing.namespace + before if before else b""
        held = self._chain.get(keys, into, parent=parent, limits=limits)
        if not all(held):
            self._knowledge.look_around()  # the scheduler's side may know more of what others store
            known = self._knowledge.standing(part.at, self._rank)
            if known.namespace == standing.namespace:
                held = fill_gaps(self._chain, known, hashes, before, into, held, limits)
        return held.index(False) if False in held else len(held)

    def _save(self, move: Move) -> None:
        stored, begun = False, time.monotonic()
        try:
            move.wait()
            saved = [self._save_part(part, move) for part in self._parts if part.saves]
            stored = all(saved)
        finally:
            self._end_save(move, stored=stored, seconds=time.monotonic() - begun)

    def _end_save(self, move: Move, *, stored: bool, seconds: float = 0.0) -> None:
        if not move.end():
            return
        number = move.job.number
        with self._changed:
            self._end_copying(move)
            del self._open[id(move)]
            self._done.saves[number] += 1
            if not stored:
                self._done.unsaved.add(number)
            self._counted.add(save_seconds=seconds)
            self._changed.notify_all()

    def _end_copying(self, move: Move) -> None:
        """With the lock."""
        if id(move) in self._copying:
            self._copying.remove(id(move))
            self._done.copied[move.job.number] += 1
            self._changed.notify_all()

    def _save_part(self, part: Part, move: Move) -> bool:
        """Whether all pages of a group are stored."""
        job, standing = move.job, move.standings[part.at]
        if job.tokens[0] % job.page_size:
            raise ValueError(f"a save begins within a page, at token {job.tokens[0]}")
        form = PageForm.of(standing.kind.page)
        keys = [standing.namespace + each for each in job.hashes]
        there = self._chain.exists(keys)
        wanted = [page for page in _pages_with_blocks(part, job) if not there[page]]
        first_page = job.tokens[0] // job.page_size
        is_last = part is [each for each in self._parts if each.saves][-1]
        stored, runs = len(wanted) + sum(there) == len(keys), spans(wanted, form.page_bytes)
        for pages in runs:
            records = self._stage().records(0, len(pages), form.page_bytes)
            if not self._copy(part, move, pages, records, load=False):
                return False
            if is_last and pages is runs[-1]:
                with self._changed:
                    self._end_copying(move)
            before = job.hashes[pages.start - 1] if pages.start else job.before
            is_first = job.is_first and pages.start == 0
            kept = self._chain.put(
                keys[pages.start : pages.stop],
                _rows(records),
                parent=b"" if is_first else standing.namespace + before,
                position=first_page + pages.start,
                limits=Limits.within(SAVE_SECONDS),
            )
            move.begun = time.monotonic()
            stored = stored and all(kept)
            with self._changed:
                self._counted.add(
                    save_pages=sum(kept),
                    save_lost_pages=len(kept) - sum(kept),
                    save_bytes=sum(kept) * form.page_bytes,
                )
        return stored

    def _copy(
        self, part: Part, move: Move, pages: range, records: torch.Tensor, *, load: bool
    ) -> bool:
        """Whether it was done. Args: pages: of the job, one record each."""
        job = move.job
        step = gcd(job.page_size, part.block_size)
        first_page = job.tokens[0] // job.page_size * job.page_size
        start = max(job.tokens[0], first_page + pages.start * job.page_size)
        end = min(job.tokens[1], first_page + pages.stop * job.page_size)
        tokens = torch.arange(start, end, step)
        record_slots = tokens - (first_page + pages.start * job.page_size)
        size = part.group.block_size
        blocks = torch.tensor(job.blocks[part.at], dtype=torch.int64)
        chosen = blocks[tokens // size - job.tokens[0] // size]
        kept = chosen != 0
        pieces = Pieces((chosen * size + tokens % size)[kept], record_slots[kept], step)
        copy = part.memory.scatter if load else part.memory.gather
        chosen_records = records[: len(pages)]
        done = move.copy(lambda: copy(pieces, chosen_records))
        if load and done:
            with self._changed:
                self._counted.add(load_bytes=chosen_records.numel())
        return done

    def _stage(self) -> Stage:
        """This thread's own."""
        stage: Stage | None = getattr(self._stages, "stage", None)
        if stage is None:
            stage = self._stages.stage = Stage(self._half_bytes, self._device)
        return stage


def _at_once() -> None:
    """There is nothing to wait for."""


def _pages_with_blocks(part: Part, job: Job) -> list[int]:
    """Those of a job's pages that a group has all blocks of; of a sliding window the others are gone, or not wanted."""
    size = part.group.block_size
    first_block, first_page = job.tokens[0] // size, job.tokens[0] // job.page_size
    blocks = job.blocks[part.at]
    found = []
    for page in range(len(job.hashes)):
        start = max(job.tokens[0], (first_page + page) * job.page_size)
        end = min(job.tokens[1], (first_page + page + 1) * job.page_size)
        if all(blocks[start // size - first_block : -(-end // size) - first_block]):
            found.append(page)
    return found


def _rows(records: torch.Tensor) -> PageSegments:
    size, start = records.shape[1], records.data_ptr()
    addresses = [start + row * size for row in range(len(records))]
    return PageSegments(addresses, [size] * len(addresses), 1, records)
