"""The one door through which the direct path gets its store.

SGLang makes a linker by itself, from the name of a module and a class, and gives it a mapping of settings. What
opens a store from settings stands above this folder (lmcache_sglang/store.py), so the plug-in leaves it here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedEngineError

if TYPE_CHECKING:
    from ..storage.chain import Chain


@dataclass(frozen=True, slots=True)
class Opened:
    """An open store, and what the settings say of the direct path.

    Attributes:
        require_room: raises when a tier cannot keep a page of so many bytes.
        landing: bytes of memory that pages land in, of this rank.
        restores_always: also what is computed sooner.
        cubins: folder in which kernels for a GPU are kept.
    """

    chain: Chain
    require_room: Callable[[Chain, int], None]
    landing: int
    restores_always: bool
    cubins: Path


Opener = Callable[[Mapping[str, Any]], Opened]

_openers: list[Opener] = []  # one, of the plug-in


def opens(opener: Opener) -> None:
    """From now on a linker's settings go here."""
    _openers[:] = [opener]


def open_store(settings: Mapping[str, Any]) -> Opened:
    """Raises: UnsupportedEngineError: the plug-in was not loaded in this process."""
    if not _openers:
        raise UnsupportedEngineError(
            "lmcache: SGLang has not loaded the plug-in of lmcache-sglang in this process; take it into "
            "SGLANG_PLUGINS, or unset that"
        )
    return _openers[0](settings)
