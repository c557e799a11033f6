"""One open chain a process, however many parts of an engine in it ask for the same one.

A process must not open a store twice: the locks by which processes tell each other apart are the process's.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock

from .config import Config
from .storage.chain import Chain
from .store import open_chain


@dataclass
class _Open:
    chain: Chain
    users: int = 0


_lock = Lock()
_open: dict[str, _Open] = {}


class SharedChain:
    """Raises: ConfigError, as `open_chain`."""

    def __init__(self, config: Config) -> None:
        self._key = config.model_dump_json()
        self._is_closed = False
        with _lock:
            if self._key not in _open:
                _open[self._key] = _Open(open_chain(config))
            _open[self._key].users += 1
            self.chain = _open[self._key].chain

    def close(self) -> None:
        """The last one closes the chain, which may take as long as that does. Idempotent."""
        with _lock:
            if self._is_closed:
                return
            self._is_closed = True
            its = _open[self._key]
            its.users -= 1
            if its.users == 0:
                del _open[self._key]
        if its.users == 0:
            its.chain.close()
