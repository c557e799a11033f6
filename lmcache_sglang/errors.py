"""What can go wrong, as one family.

    LMCacheError
    ├── ConfigError              a setting is wrong: names it and the fix; raised at start
    ├── UnsupportedEngineError   the engine lacks a seam this package stands on; raised at start
    ├── CudaError                a CUDA call failed: names the call and what the driver said
    │   └── CudaUnavailableError our kernels cannot be built or run here; the engine's own still can
    ├── TraceError               a trace cannot be read: names the file and the line
    ├── PictureError             a picture cannot be drawn: says what is missing
    └── TierError                a tier could not do what it was asked, with the reason

A `TierError` never reaches an engine: `storage.chain.Chain` turns it into a miss and counts it by
tier and reason. The first two stop the engine before it serves.
"""

from __future__ import annotations

from enum import StrEnum


class LMCacheError(Exception):
    """The root of the family."""


class ConfigError(LMCacheError, ValueError):
    """A setting cannot be used.

    Args:
        setting: the key as the user writes it, for example ``disk.size``.
        problem: what is wrong and what would be right.
    """

    def __init__(self, setting: str, problem: str) -> None:
        self.setting = setting
        self.problem = problem
        super().__init__(f"{setting}: {problem}")

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, str]]:
        return type(self), (self.setting, self.problem)


class UnsupportedEngineError(LMCacheError, RuntimeError):
    """The running engine does not have what this package builds on."""


class TraceError(LMCacheError, ValueError):
    """A file is no trace that can be replayed."""


class PictureError(LMCacheError, RuntimeError):
    """A picture cannot be drawn, or not be written."""


class CudaError(LMCacheError, RuntimeError):
    """A CUDA call failed."""


class CudaUnavailableError(CudaError):
    """Our kernels cannot be built, or not run, on this machine: says what is missing and what brings it.

    The direct path (hicache), which asks, goes on with the engine's own kernels.
    """


class Reason(StrEnum):
    """Why a tier failed; the value is the counter's name."""

    IO = "io"  # the medium refused or failed
    FULL = "full"  # no room, neither by eviction nor on the medium
    CORRUPT = "corrupt"  # the tier's own structure, or a record in it, is damaged
    BUSY = "busy"  # it did not come free before the deadline
    CLOSED = "closed"  # it is shut, or was taken out of service


class TierError(LMCacheError):
    """A tier could not do what it was asked; nothing was changed unless the tier says otherwise."""

    def __init__(self, tier: str, reason: Reason, detail: str) -> None:
        self.tier = tier
        self.reason = reason
        self.detail = detail
        super().__init__(f"{tier} tier: {reason}: {detail}")

    def __reduce__(self) -> tuple[type[TierError], tuple[str, Reason, str]]:
        return type(self), (self.tier, self.reason, self.detail)
