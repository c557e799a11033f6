"""A tier that fails, or holds its writes, on command: to test what lies above it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Event

from ..errors import Reason, TierError
from ..kernels.pages import PageSegments
from ..storage.base import CheckReport, Lookup, Stored, Tier, TierStats

HOLD_SECONDS = 60.0  # a test that forgets to let go fails instead of hanging


class FaultyTier(Tier):
    """Passes every call on to `inner`, unless told otherwise.

    Attributes:
        failing: while set, every call but `close` raises a `TierError` with this reason.
        puts: the keys of each `put` that reached `inner`.
        holding: set while a `put` is being held.
    """

    def __init__(self, inner: Tier) -> None:
        self.name = inner.name
        self.capacity = inner.capacity
        self.inner = inner
        self.failing: Reason | None = None
        self.puts: list[list[bytes]] = []
        self.holding = Event()
        self._may_pass = Event()
        self._may_pass.set()

    @contextmanager
    def hold_puts(self) -> Iterator[None]:
        """No `put` returns, nor changes anything, before the block ends."""
        self._may_pass.clear()
        try:
            yield
        finally:
            self._may_pass.set()

    def _asked(self) -> Tier:
        if self.failing is not None:
            raise TierError(self.name, self.failing, "told to fail")
        return self.inner

    def fits(self, page_bytes: int) -> bool:
        return self.inner.fits(page_bytes)

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        return self._asked().exists(keys)

    def get(self, keys: Sequence[bytes], into: PageSegments) -> list[Lookup]:
        return self._asked().get(keys, into)

    def put(
        self, keys: Sequence[bytes], pages: PageSegments, checksums: Sequence[int] | None = None
    ) -> list[Stored]:
        if not self._may_pass.is_set():
            self.holding.set()
            assert self._may_pass.wait(HOLD_SECONDS), "nobody let go of this put"
            self.holding.clear()
        self._asked()
        self.puts.append(list(keys))
        return self.inner.put(keys, pages, checksums)

    def remove(self, keys: Sequence[bytes]) -> int:
        return self._asked().remove(keys)

    def clear(self, namespace: bytes) -> int:
        return self._asked().clear(namespace)

    def stats(self) -> TierStats:
        return self._asked().stats()

    def check(self, *, repair: bool = False) -> CheckReport:
        return self._asked().check(repair=repair)

    def close(self) -> None:
        self.inner.close()
