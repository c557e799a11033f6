"""What the store has of a chain of pages, for all groups and ranks of an engine."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_URL, uuid4, uuid5

import msgspec

from ..hicache.lookup import Wanted, look_up
from ..hicache.namespaces import Namespaces
from ..hicache.sources import Source, with_weights
from ..hicache.stored_pool import Standing
from ..hicache.tiling import tiling
from .groups import Group, Topology, kind_of, page_of

if TYPE_CHECKING:
    from ..hicache.identity import ModelIdentity
    from ..storage.chain import Chain

logger = logging.getLogger(__name__)


class Knowledge:
    """Args: model: what computes the pages. chain: the open store."""

    def __init__(
        self,
        model: ModelIdentity,
        groups: Sequence[Group],
        topology: Topology,
        page_size: int,
        chain: Chain,
    ) -> None:
        self._model = model
        self._groups = groups
        self._topology = topology
        self._page_size = page_size
        self._chain = chain
        self._namespaces = Namespaces(chain.directories)
        self._adapters: dict[tuple[int, str], str] = {}
        self._lock = Lock()
        self._standings = self._of(model)

    def _of(self, model: ModelIdentity) -> list[list[Standing]]:
        """Of each group and rank."""
        return [
            [
                Standing(kind_of(model, page_of(group, self._topology, rank, self._page_size)))
                for rank in range(1 if group.latent else self._topology.ranks)
            ]
            for group in self._groups
        ]

    @property
    def lasting(self) -> bool:
        """Whether another engine, or this one after a restart, can ever find its pages."""
        return self._model.lasting

    def rename(self, weights: str) -> None:
        """The weights are not those of the model's files any more. Args: weights: a name that nobody else has."""
        settings = self._model.settings | {"weights": weights}
        model = msgspec.structs.replace(self._model, settings=settings)
        standings = self._of(model)
        with self._lock:
            self._model, self._standings = model, standings

    def standing(self, group: int, rank: int) -> Standing:
        """Args: group: its place among the groups."""
        standings = self._standings[group]
        return standings[min(rank, len(standings) - 1)]

    def announce(self, rank: int) -> None:
        """Put a rank's kinds of page on record."""
        for at in range(len(self._groups)):
            kind = self.standing(at, rank).kind
            if kind.model.lasting:
                self._namespaces.add(kind)
            logger.info(
                "lmcache: pages of %d tokens and %d bytes, namespace %s (%s)",
                kind.page.page_size,
                kind.page.page_bytes,
                kind.namespace.hex(),
                kind.page,
            )

    def look_around(self) -> bool:
        """Take note of what other engines have begun to store; whether that is anything new."""
        if not self._model.lasting or not self._namespaces.news():
            return False
        kinds = self._namespaces.kinds()
        with self._lock:
            self._standings = [
                [Standing(each.kind, tiling(each.kind, kinds)) for each in standings]
                for standings in self._standings
            ]
        return True

    def clear(self) -> None:
        """Forget every page of this engine's kinds. Raises: TierError: some are still there."""
        for standing in [each for standings in self._standings for each in standings]:
            self._chain.clear(standing.namespace)

    def prefix(self, hashes: Sequence[bytes], seed: bytes, page_size: int) -> int:
        """How many of the first pages of a chain can be restored, on every rank and in every group."""
        found = self._prefix(hashes, page_size)
        if found < len(hashes) and self.look_around():
            return self._prefix(hashes, page_size)
        return found

    def _prefix(self, hashes: Sequence[bytes], page_size: int) -> int:
        usable = len(hashes)
        windows: list[tuple[int, list[bool]]] = []
        for group, standings in zip(self._groups, self._standings, strict=True):
            for standing in standings:
                wanted = Wanted(standing, list(hashes[:usable]))
                (found,), _ = look_up(self._chain, [wanted])
                if group.window:
                    windows.append((-(-(group.window - 1) // page_size), found.here))
                elif False in found.here:
                    usable = found.here.index(False)
        while usable and not all(
            all(here[max(0, usable - pages) : usable]) for pages, here in windows
        ):
            usable -= 1
        return usable

    def adapter_of(self, lora: Any) -> str | None:
        """The id of a request's LoRA adapter: the one that SGLang's side has for it (hicache/engine.py `adapter_id`)."""
        if lora is None:
            return None
        key = lora.lora_int_id, lora.lora_path
        before = self._adapters.get(key)
        if before is None or lora.load_inplace:
            self._adapters[key] = adapter_id(lora.lora_name, lora.lora_path)
        if before not in (None, self._adapters[key]):
            # vLLM's own blocks of the one before have the same name there, and are mixed with what is computed now.
            self._adapters[key] = uuid4().hex
        return self._adapters[key]


def adapter_id(name: str, path: str) -> str:
    """SGLang's id of an adapter, made one with a fingerprint of its weights; another one each time where they cannot be
    looked at, so that its pages are this engine's own."""
    named = uuid5(NAMESPACE_URL, f"{name}\0{path}").hex
    try:
        own = Source(path).fingerprint()
    except OSError as error:
        logger.warning(
            "lmcache: the adapter %s at %s cannot be looked at (%s): its pages are for this engine only",
            name,
            path,
            error,
        )
        return uuid4().hex
    return with_weights(named, own)
