"""The scheduler's side: what is stored of a request, what is loaded, and what is saved.

vLLM's contract (0.32, v1/core/sched/scheduler.py): `matched` is asked again in each step for as long as a request waits;
`allocated` is told once blocks are there, a second time when the load has ended; `jobs` comes at the end of each step
that is scheduled, before any of it runs. Blocks that are being copied from are held by a reference of their own, so that
neither the end of a request nor a preemption waits for a save.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from math import lcm
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from ..hicache.page_hashes import page_hashes, seed
from .events import StoreEvents
from .jobs import IDLE_SECONDS, Done, Job, Jobs, Renamed, Replaced
from .lookups import Asked, Lookups

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from .groups import Group
    from .knowledge import Knowledge

logger = logging.getLogger(__name__)

HELD_PART = 4  # of all blocks at most one in so many is held for saves


@dataclass(slots=True)
class _Known:
    """A request.

    Attributes:
        hashes: of its pages so far.
        asked: the lookup that is under way, or none.
        stored: tokens that the store had when it was asked; -1: it was not yet.
        asked_at: preemptions of the request by then.
        computed: tokens that vLLM had by then.
        ran: tokens whose step was begun, so that their blocks hold, or will hold, what they should; others may be of blocks
            that somebody is to load.
        saved: tokens that need not be saved any more, a multiple of the page.
    """

    request: Request
    seed: bytes
    hashes: list[bytes] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    stored: int = -1
    asked_at: int = 0
    computed: int = 0
    ran: int = 0
    saved: int = 0


@dataclass(slots=True)
class _Saving:
    """A save. Attributes: held: blocks that were not copied from yet. copied, ended: workers that have."""

    job: Job
    request: Request
    held: list[Any]
    copied: int = 0
    ended: int = 0


class Planner:
    """One engine's.

    Args:
        groups: of KV cache.
        page_size: tokens of a page.
        ranks: workers that each save a part.
        knowledge: says what is stored.
        events: to be told what is stored.
        ahead: steps that are planned before a step's outcome is told.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        page_size: int,
        ranks: int,
        knowledge: Knowledge,
        events: StoreEvents,
        *,
        ahead: int = 0,
    ) -> None:
        self._skipped_pages = 0  # since the last look
        self._lookups = Lookups()
        self._groups = groups
        self._page_size = page_size
        self._ranks = ranks
        self._knowledge = knowledge
        self._events = events
        self._unit = lcm(page_size, *(group.block_size for group in groups))
        self._known: dict[str, _Known] = {}
        self._loads: list[Job] = []
        self._loading: dict[str, tuple[Job, Request]] = {}
        self._saves: list[Job] = []
        self._saving: dict[int, _Saving] = {}
        self._held = 0  # blocks
        self._renamed: list[Renamed] = []
        self._drops_saves = False
        self._replacements: dict[int, Replaced] = {}
        self._ahead = ahead
        self._doubtful = 0  # steps from now on
        self._step = 0  # the number of the last one that computed or loaded something
        self._reset_at = 0  # the last one before vLLM's cache was empty
        self._is_stale = False  # vLLM's cache has blocks of weights that were replaced
        self._numbers = count(1)
        self._pool: BlockPool | None = None

    def bind(self, pool: BlockPool) -> None:
        """Take the pool that blocks are held in."""
        self._pool = pool
        reset = pool.reset_prefix_cache
        # vLLM resets its cache only while nobody holds a block; saves hold some for a moment longer than requests do.
        pool.reset_prefix_cache = lambda: self._reset(reset)

    def matched(self, request: Request, computed: int) -> int | None:
        """Tokens that the store has beyond those that are computed; None: not known yet. Changes nothing.

        Args:
            computed: tokens that vLLM has itself, a multiple of its blocks.
        """
        if request.skip_reading_prefix_cache or not _has_plain_tokens(request):
            return 0
        known = self._of(request)
        if known.stored < 0 or known.asked_at != request.num_preemptions:
            if not known.asked:
                hashes = self._hashes(known, request.num_tokens)
                known.asked.append(self._lookups.ask(lambda: self._look_up(hashes, known.seed)))
            (asked,) = known.asked
            if not asked.ended.is_set():
                if not self._lookups.hang:
                    return None
                self._lookups.give_up(asked)
            known.asked.clear()
            known.stored, known.asked_at = asked.found, request.num_preemptions
            self._events.found(known.hashes, asked.found // self._page_size)
        known.computed = computed
        return max(0, known.stored - computed)

    def allocated(self, request: Request, blocks: Sequence[Sequence[int]], tokens: int) -> None:
        """vLLM has blocks for a request, and wants so many tokens of the store in them.

        Args:
            blocks: of each of vLLM's groups, all that the request has.
        """
        if request.request_id in self._known:
            self._known[request.request_id].ran = 0
        if tokens == 0:
            return
        known = self._of(request)
        end = known.computed + tokens
        job = self._job(known, known.computed, end, blocks, number=0)
        self._loads.append(job)
        self._loading[request.request_id] = job, request
        known.saved = max(known.saved, end)
        known.stored = 0  # one that is asked again, and was not preempted, has failed to load

    def jobs(self, output: SchedulerOutput) -> Jobs:
        """What the workers are to do in this step."""
        computes = output.total_num_scheduled_tokens > 0
        self._step += computes or bool(self._loads)
        self._lookups.begin_step()
        # What another connector loads in this very step may fail, and all that is computed from it with it; steps that are
        # planned before that is told, too.
        if output.has_sync_kv_loads:
            self._doubtful = 1 + self._ahead
        if not self._doubtful:
            self._save_filled(output)
        elif computes:
            self._doubtful -= 1
        if not computes and not self._loads:
            self._lookups.wait(IDLE_SECONDS)
        jobs = Jobs(
            self._loads, self._saves, self._renamed, computes, self._step, self._drops_saves
        )
        self._drops_saves = False
        self._loads, self._saves, self._renamed = [], [], []
        return jobs

    def _save_filled(self, output: SchedulerOutput) -> None:
        """The pages that this step fills."""
        state = output.kv_connector_block_state
        assert state is not None
        for request_id, scheduled in output.num_scheduled_tokens.items():
            known = self._known.get(request_id)
            if known is not None:
                known.ran = known.request.num_computed_tokens + scheduled
                end = self._end(known, known.ran)
                if end > known.saved:  # most steps of most requests fill no page
                    self._save(known, end, state.get_block_ids(request_id))

    def added(self, request: Request) -> None:
        """vLLM has a new request."""
        if _has_plain_tokens(request):
            self._of(request)

    def finished(self, request: Request, blocks: Sequence[Sequence[int]]) -> None:
        """A request is over; its blocks are freed after this, or when its load has ended."""
        known = self._known.pop(request.request_id, None)
        if known is not None:
            end = self._end(known, min(request.num_computed_tokens, known.ran))
            if end > known.saved:
                self._save(known, end, blocks, is_last=True)

    def told(self, done: Done) -> None:
        """What workers have got through."""
        self._rename(done.replacements)
        for request, token in done.short.items():
            if (known := self._known.get(request)) is not None:
                # Computed, they are to be saved; a page that vLLM itself had the first part of is saved as a whole.
                known.saved = min(known.saved, token - token % self._page_size)
            if request in self._loading:
                job, its = self._loading[request]
                self._loading[request] = _until(job, token), its
        for number, workers in done.copied.items():
            saving = self._saving[number]
            saving.copied += workers
            if saving.copied == self._ranks:
                self._let_go(saving)
        for number in done.unsaved:
            self._saving[number].job = _until(self._saving[number].job, 0)
        for number, workers in done.saves.items():
            saving = self._saving[number]
            saving.ended += workers
            if saving.ended == self._ranks:
                self._let_go(saving)
                del self._saving[number]
                self._events.stored(saving.job, saving.request)

    def loaded(self, request_id: str) -> None:
        """All workers are done with what they were to load for a request."""
        if request_id in self._loading:
            self._events.stored(*self._loading.pop(request_id))

    def forget(self) -> None:
        """Nothing that was stored by now is to be found any more; requests under way are saved anew."""
        for known in self._known.values():
            known.asked.clear()
            known.stored, known.saved = -1, 0
        self._events.cleared()

    def drop_saves(self) -> None:
        """What waits to be saved is not wanted any more. What is being written now is there all the same."""
        self._discard_unsent()
        self._drops_saves = True

    @property
    def is_busy(self) -> bool:
        """Whether workers must go on being asked, though there may be no request."""
        return bool(self._saves or self._saving)

    def counted(self) -> dict[str, float]:
        """Of `statistics.COUNTERS`, since the last look."""
        counted = {"save_skipped_pages": self._skipped_pages, **self._lookups.counted()}
        self._skipped_pages = 0
        return counted

    def close(self) -> None:
        self._lookups.close()
        if lost := sum(len(job.hashes) for job in self._saves):
            logger.warning(
                "lmcache: the engine ends without a step in which %d pages could be saved", lost
            )

    def _of(self, request: Request) -> _Known:
        known = self._known.get(request.request_id)
        if known is None:
            adapter = self._knowledge.adapter_of(request.lora_request)
            known = _Known(request, seed(adapter, request.cache_salt))
            self._known[request.request_id] = known
        return known

    def _hashes(self, known: _Known, tokens: int) -> list[bytes]:
        """Of all pages that these first tokens fill."""
        have = len(known.hashes)
        if tokens // self._page_size > have:
            before = known.hashes[-1] if have else known.seed
            new = known.request.all_token_ids[have * self._page_size : tokens]
            known.hashes += page_hashes(new, self._page_size, before)
        return known.hashes[: tokens // self._page_size]

    def _look_up(self, hashes: list[bytes], chain_seed: bytes) -> int:
        pages = self._knowledge.prefix(hashes, chain_seed, self._page_size)
        tokens = pages * self._page_size
        return tokens - tokens % self._unit

    def _end(self, known: _Known, computed: int) -> int:
        """Up to where these tokens fill pages, and are known by now.

        What speculation only guessed is not among them: a request's tokens are those that were accepted.
        """
        end = min(computed, int(known.request.num_tokens))
        return end - end % self._page_size

    def _save(
        self,
        known: _Known,
        end: int,
        blocks: Sequence[Sequence[int]],
        *,
        is_last: bool = False,
    ) -> None:
        """Save what was not, up to a page's end."""
        assert self._pool is not None
        if self._is_stale:
            return
        job = self._job(known, known.saved, end, blocks, number=next(self._numbers))
        held = [self._pool.blocks[block] for group in job.blocks for block in group if block]
        if self._held and self._held + len(held) > len(self._pool.blocks) // HELD_PART:
            if is_last:  # others are saved in a later step
                self._skipped_pages += len(job.hashes)
            return
        known.saved = end
        self._pool.touch(held)
        self._held += len(held)
        self._saving[job.number] = _Saving(job, known.request, held)
        self._saves.append(job)

    def _let_go(self, saving: _Saving) -> None:
        assert self._pool is not None
        held, saving.held = saving.held, []
        self._held -= len(held)
        self._pool.free_blocks(reversed(held))

    def _reset(self, reset: Any) -> bool:
        """vLLM resets its cache. The blocks of saves keep what is to be copied from them: nobody else gets one."""
        assert self._pool is not None
        for saving in self._saving.values():
            self._pool.free_blocks(reversed(saving.held))
        try:
            is_done = bool(reset())
        finally:
            for saving in self._saving.values():
                self._pool.touch(saving.held)
        if is_done:
            self._reset_at, self._is_stale = self._step, False
        return is_done

    def _rename(self, replacements: dict[int, Replaced]) -> None:
        new = {rank: it for rank, it in replacements.items() if it != self._replacements.get(rank)}
        if not new:
            return
        self._replacements |= new
        self._name_weights()
        if any(replaced.after > self._reset_at for replaced in new.values()):
            self._is_stale = True
            logger.warning(
                "lmcache: weights were replaced, and vLLM's own cache still has what the old ones computed: nothing is "
                "saved until it is reset (reset_prefix_cache)"
            )

    def _name_weights(self) -> None:
        renamed = Renamed(uuid4().hex, dict(self._replacements))
        self._renamed = [renamed]
        self._knowledge.rename(renamed.weights)
        self._discard_unsent()
        self.forget()

    def _discard_unsent(self) -> None:
        """Saves that no worker was given: what they would be stored as is not what it was."""
        for job in self._saves:
            self._let_go(self._saving.pop(job.number))
        self._saves = []

    def _job(
        self,
        known: _Known,
        start: int,
        end: int,
        blocks: Sequence[Sequence[int]],
        *,
        number: int,
    ) -> Job:
        hashes = self._hashes(known, end)
        first = start // self._page_size
        return Job(
            number=number,
            request=known.request.request_id,
            tokens=(start, end),
            page_size=self._page_size,
            hashes=tuple(hashes[first:]),
            before=hashes[first - 1] if first else known.seed,
            is_first=first == 0,
            blocks=tuple(
                tuple(blocks[group.number][start // group.block_size : -(-end // group.block_size)])
                for group in self._groups
            ),
        )


def _until(job: Job, token: int) -> Job:
    """What of a job lies before a token, as far as its pages go."""
    pages = max(0, token - job.tokens[0] // job.page_size * job.page_size) // job.page_size
    return Job(
        job.number,
        job.request,
        (job.tokens[0], max(job.tokens[0], min(job.tokens[1], token))),
        job.page_size,
        job.hashes[:pages],
        job.before,
        job.is_first,
        job.blocks,
    )


def _has_plain_tokens(request: Request) -> bool:
    """Whether token ids say all that a page is of, for good: not so for images, sound and embeddings, and for requests
    whose input streams in, which may take tokens back."""
    return not request.mm_features and request.prompt_embeds is None and not request.resumable
