"""Cubins for a GPU: kept ones, or made now; and a command that makes them ahead of time.

python -m lmcache_sglang.kernels.cuda.build --arch sm_90 --into DIR
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
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


def cubin_for(arch: str, directory: Path) -> Built:
    """The kernels for one architecture.

    nvcc's cubin if one was made ahead of time; else NVRTC's, kept or made now; else nvcc's, made now.

    Args:
        arch: for example sm_90.
        directory: where cubins are kept. One that cannot be written costs a second at each start, no more.

    Raises:
        CudaUnavailableError: there is none, and neither compiler can make one; says why for each.
    """
    kept = Cubins(directory)
    ahead = kept.find(arch, AHEAD)
    if ahead is not None:
        return Built(ahead, "nvcc, ahead of time", compiled=False)
    reasons = []
    for make in (Nvrtc, Nvcc):
        try:
            return _by(make(), arch, kept)
        except CudaUnavailableError as error:
            reasons.append(str(error))
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
