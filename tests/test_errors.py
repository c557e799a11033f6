"""Errors name what a person has to change, and stay themselves on the way to that person."""

from __future__ import annotations

import copy

import pytest

from lmcache_sglang.errors import (
    ConfigError,
    CudaError,
    CudaUnavailableError,
    LMCacheError,
    Reason,
    TierError,
    UnsupportedEngineError,
)


def test_a_config_error_names_the_setting_and_the_problem() -> None:
    error = ConfigError("disk.size", "the least is 1048576")
    assert str(error) == "disk.size: the least is 1048576"
    assert (error.setting, error.problem) == ("disk.size", "the least is 1048576")


def test_a_tier_error_names_the_tier_and_the_reason() -> None:
    error = TierError("disk", Reason.FULL, "no room")
    assert str(error) == "disk tier: full: no room"


def test_a_copied_config_error_is_the_same_error() -> None:
    """Frameworks copy exceptions to raise them again in another thread."""
    error = ConfigError("path", "is a file")
    again = copy.copy(error)
    assert type(again) is ConfigError
    assert (str(again), vars(again)) == (str(error), vars(error))


@pytest.mark.parametrize(
    "kind", [ConfigError, UnsupportedEngineError, CudaError, CudaUnavailableError, TierError]
)
def test_one_except_clause_catches_all_of_them(kind: type[Exception]) -> None:
    assert issubclass(kind, LMCacheError)
    assert issubclass(ConfigError, ValueError)
    assert issubclass(UnsupportedEngineError, RuntimeError)
