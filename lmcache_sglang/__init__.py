"""lmcache-sglang: KV pages that outlive the engine.

SGLang users need nothing from here: ``--hicache-storage-backend lmcache`` is enough.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import Config
    from .errors import ConfigError, LMCacheError, TierError, UnsupportedEngineError
    from .store import Store

__all__ = ["Config", "ConfigError", "LMCacheError", "Store", "TierError", "UnsupportedEngineError"]

# Imported at first use: every SGLang process loads the plug-in, also where the flag is not used.
_HOMES = {
    "Config": "config",
    "ConfigError": "errors",
    "LMCacheError": "errors",
    "Store": "store",
    "TierError": "errors",
    "UnsupportedEngineError": "errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
