"""What the scheduler's side asks of the workers' side in a step, and what it is told."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

IDLE_SECONDS = 0.002  # that a step with nothing to compute waits for other threads: in one process vLLM would spin


@dataclass(frozen=True, slots=True)
class Job:
    """Tokens of one request, between its blocks and the store's pages.

    Attributes:
        number: of a save, by which it is told of; of a load 0.
        request: vLLM's id of it.
        tokens: first, and one past the last; multiples of the longest piece that blocks and pages have in common, and of a
            save multiples of the page.
        page_size: tokens.
        hashes: of the pages that hold them.
        before: the hash of the page before those; the seed of the chain, or nothing, for the first one.
        is_first: they begin the chain.
        blocks: of each group, those that hold the tokens; 0 where vLLM keeps none.
    """

    number: int
    request: str
    tokens: tuple[int, int]
    page_size: int
    hashes: tuple[bytes, ...]
    before: bytes
    is_first: bool
    blocks: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Replaced:
    """A worker's weights are not those of the files. Attributes: count: how often. after: the number of the last step
    before that."""

    count: int
    after: int


@dataclass(frozen=True, slots=True)
class Renamed:
    """The weights that no file holds have a name.

    Attributes:
        weights: the name; nobody else has it.
        replacements: of each rank that told of any, which was the last one when the name was given.
    """

    weights: str
    replacements: dict[int, Replaced]


@dataclass
class Jobs(KVConnectorMetadata):  # type: ignore[misc]  # vLLM is not typed here
    """Of one step.

    Attributes:
        number: of the step, or of the last one that computed or loaded something.
        renamed: since the last one, none or one; it counts for these jobs.
        computes: whether the step has tokens to compute.
        forgets: what was to be saved before is not wanted any more.
    """

    loads: list[Job] = field(default_factory=list)
    saves: list[Job] = field(default_factory=list)
    renamed: list[Renamed] = field(default_factory=list)
    computes: bool = True
    number: int = 0
    forgets: bool = False


@dataclass
class Done(KVConnectorWorkerMetadata):  # type: ignore[misc]  # as above
    """What workers have got through since they told last.

    Attributes:
        copied: by the number of the save, how many workers need its blocks no more.
        saves: by the number of the save, how many workers are done with it, whatever became of it.
        unsaved: the numbers of those of which a page was not stored.
        short: loads that did not bring all: by request, the first token that is missing.
        replacements: by rank, of weights that no name was given to.
    """

    copied: Counter[int] = field(default_factory=Counter)
    saves: Counter[int] = field(default_factory=Counter)
    unsaved: set[int] = field(default_factory=set)
    short: dict[str, int] = field(default_factory=dict)
    replacements: dict[int, Replaced] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Done:
        assert isinstance(other, Done)
        short = {
            request: min(each.get(request, 1 << 62) for each in (self.short, other.short))
            for request in self.short | other.short
        }
        return Done(
            self.copied + other.copied,
            self.saves + other.saves,
            self.unsaved | other.unsaved,
            short,
            self.replacements | other.replacements,
        )

    def __bool__(self) -> bool:
        return bool(self.copied or self.saves or self.unsaved or self.short or self.replacements)
