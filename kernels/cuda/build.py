"""Cubins for a GPU: kept ones, or made now."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ...errors import CudaUnavailableError
from .compilers import Compiler, Nvcc, Nvrtc
from .cubins import Cubins

logger = logging.getLogger(__name__)

AHEAD = "nvcc-*"  # made ahead of time (__main__.py), or where there was no NVRTC


@dataclass(frozen=True, slots=True)
class Built:
    """A cubin.

    Attributes:
        source: what made it, for people.
        compiled: by this call, not taken from disk.
    """

    cubin: bytes
    source: str
    compiled: bool


def cubin_for(
    arch: str, directory: Path, accept: Callable[[Built], None] = lambda _: None
) -> Built:
    """The kernels for one architecture: the first of these that is accepted.

    nvcc's cubins that were made ahead of time, the newest first; NVRTC's, kept or made now; nvcc's, made now.

    Args:
        arch: for example sm_90.
        directory: where cubins are kept. One that cannot be written costs a second at each start, no more.
        accept: takes one; CudaUnavailableError where it cannot, for example since the driver is older than nvcc.

    Raises:
        CudaUnavailableError: there is none, and neither compiler can make one; says why for each.
    """
    kept = Cubins(directory)
    makes: list[Callable[[], Built]] = [
        partial(Built, cubin, "nvcc, ahead of time", compiled=False)
        for cubin in kept.find_all(arch, AHEAD)
    ]
    makes += [lambda: _by(Nvrtc(), arch, kept), lambda: _by(Nvcc(), arch, kept)]
    reasons = []
    for make in makes:
        try:
            built = make()
            accept(built)
        except CudaUnavailableError as error:
            reasons.append(str(error))
        else:
            return built
    raise CudaUnavailableError(f"no kernels for {arch}: {'; '.join(reasons)}")


def _by(compiler: Compiler, arch: str, kept: Cubins) -> Built:
    cubin = kept.find(arch, compiler.name)
    if cubin is not None:
        return Built(cubin, compiler.name, compiled=False)
    cubin = compiler.compile(arch)
    try:
        kept.keep(arch, compiler.name, cubin)
    except OSError as error:
        logger.warning("the kernels are compiled again at the next start: %s", error)
    return Built(cubin, compiler.name, compiled=True)
