"""A host pool whose pages are stored: under which names, and where they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import msgspec
import torch

from ..kernels.pages import PageSegments
from .identity import ModelIdentity, PageIdentity, namespace
from .kind import Kind
from .pools import HostPool, Sharding, describe, logical_page_size, segments, stage
from .tiling import NOTHING, Tiling, tiling

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .pools import FlatPool

Held = Callable[[Sequence[bool]], None]  # to be told which pages came


class Access(Protocol):
    """How the bytes of a pool's pages are reached."""

    def reading(self, indices: torch.Tensor) -> AbstractContextManager[PageSegments]:
        """Memory to write to a store from."""

    def writing(self, indices: torch.Tensor) -> AbstractContextManager[tuple[PageSegments, Held]]:
        """Memory to bring pages to; what came is then told, and so put in its place."""


class InPlace:
    """The pool says where its pages lie: nothing is copied on the way."""

    def __init__(self, host: HostPool) -> None:
        self._host = host

    def reading(self, indices: torch.Tensor) -> AbstractContextManager[PageSegments]:
        return nullcontext(segments(self._host, indices))

    def writing(self, indices: torch.Tensor) -> AbstractContextManager[tuple[PageSegments, Held]]:
        return nullcontext((segments(self._host, indices), _nothing_to_do))


def _nothing_to_do(held: Sequence[bool]) -> None:
    """The pages are where they belong."""


class WholePages:
    """The pool hands its pages out, and takes them, as flat tensors only: a copy each way."""

    def __init__(self, host: HostPool) -> None:
        self._host = cast("FlatPool", host)

    def reading(self, indices: torch.Tensor) -> AbstractContextManager[PageSegments]:
        pages = [self._host.get_data_page(start, flat=True) for start in self._starts(indices)]
        return nullcontext(_segments_of([page.contiguous() for page in pages]))

    @contextmanager
    def writing(self, indices: torch.Tensor) -> Iterator[tuple[PageSegments, Held]]:
        starts = self._starts(indices)
        pages = [self._host.get_dummy_flat_data_page().contiguous() for _ in starts]

        def take(held: Sequence[bool]) -> None:
            for start, page, came in zip(starts, pages, held, strict=True):
                if came:
                    self._host.set_from_flat_data_page(start, page)

        yield _segments_of(pages), take

    def _starts(self, indices: torch.Tensor) -> list[int]:
        starts: list[int] = indices[:: logical_page_size(self._host)].tolist()
        return starts


def _segments_of(pages: list[torch.Tensor]) -> PageSegments:
    addresses = [page.data_ptr() for page in pages]
    return PageSegments(addresses, [page.nbytes for page in pages], 1, pages)


@dataclass(frozen=True, slots=True)
class Standing:
    """What the pages of a pool are called now, and whose else may be read."""

    kind: Kind
    tiling: Tiling = NOTHING

    @property
    def namespace(self) -> bytes:
        return self.kind.namespace


class Named:
    """A pool whose pages have a name in the store.

    Args:
        identity: of its pages.
    """

    def __init__(self, identity: PageIdentity) -> None:
        self.identity = identity
        self._standing: Standing | None = None

    def is_of_stage(self, sharding: Sharding) -> None:
        """Its layers do not say which pipeline stage they are of: the stage is named."""
        slices = self.identity.slices | stage(sharding)
        self.identity = msgspec.structs.replace(self.identity, slices=slices)

    def belongs_to(self, model: ModelIdentity) -> None:
        """From now on its pages are those of this model, and only its own are of any use to it."""
        self._standing = Standing(Kind(namespace(model, self.identity), model, self.identity))

    def look_around(self, others: Iterable[Kind]) -> Tiling:
        """Find out which pages of others are of use. Not while `belongs_to` runs in another thread."""
        kind = self.standing.kind
        self._standing = Standing(kind, tiling(kind, others))
        return self._standing.tiling

    @property
    def standing(self) -> Standing:
        """To be read once a call: it changes when weights are replaced. `belongs_to` comes first."""
        assert self._standing is not None
        return self._standing

    @property
    def namespace(self) -> bytes:
        """Of its own pages, now."""
        return self.standing.namespace


class StoredPool(Named):
    """One host pool of a rank.

    Args:
        host: SGLang's.
        name: SGLang's `PoolName`, as text.
        sharding: SGLang's `HiCacheStorageConfig`.
        first_page: the indices of any one page.
        kv_heads: of the whole model; 0 where it is not known.

    Raises:
        NotImplementedError: it says neither where its pages lie nor what they hold.
    """

    def __init__(
        self,
        host: HostPool,
        name: str,
        sharding: Sharding,
        first_page: torch.Tensor,
        kv_heads: int = 0,
    ) -> None:
        self.host = host
        self.name = name
        self.access, self.page_bytes = _access(host, name, first_page)
        super().__init__(describe(host, name, sharding, self.page_bytes, kv_heads))

    @property
    def is_draft(self) -> bool:
        """Whether a draft model computes it, or a part of each page: layers packed in behind the target's."""
        layers = getattr(self.host, "layer_num", None)
        return self.name.startswith("draft") or (
            getattr(self.host, "target_layer_num", layers) != layers
        )

    @property
    def page_size(self) -> int:
        """Indices that one page takes in a call."""
        return logical_page_size(self.host)


def is_logical(host: object) -> bool:
    """Whether a pool gives out indices and has no pages: DeepSeek V4's KV pool, beside which others hold the KV.

    By SGLang's type and by nothing less: a pool whose memory is another's, or that has none on this rank, must not
    pass for one whose pages need not be read.
    """
    from sglang.srt.mem_cache.memory_pool_host import LogicalHostPool

    return isinstance(host, LogicalHostPool)


def require_reachable(host: HostPool, name: str) -> None:
    """Raises: NotImplementedError, as `StoredPool`."""
    _access(host, name, torch.arange(logical_page_size(host), dtype=torch.int64))


def _access(host: HostPool, name: str, first_page: torch.Tensor) -> tuple[Access, int]:
    """How its pages are reached, and the bytes of one. Pools refuse by an exception, and say so in SGLang."""
    if getattr(host, "kv_buffer", host) is None:
        raise _unreachable(host, name, ["it has no memory of its own"])
    refusals = []
    for kind in (InPlace, WholePages):
        access: Access = kind(host)
        try:
            with access.reading(first_page) as page:
                return access, sum(page.sizes)
        except (
            AssertionError,
            AttributeError,
            NotImplementedError,
            TypeError,
            ValueError,
        ) as refusal:
            refusals.append(str(refusal))
    raise _unreachable(host, name, refusals)


def _unreachable(host: HostPool, name: str, why: list[str]) -> NotImplementedError:
    return NotImplementedError(
        f"lmcache: the pages of the pool {name!r} ({type(host).__name__}) cannot be reached: "
        f"{'; '.join(why)}. Serve this model without --hicache-storage-backend lmcache"
    )
