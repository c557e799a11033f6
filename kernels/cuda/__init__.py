"""Copies of pages on an NVIDIA GPU: kernels built at first use or ahead of time, launched on torch's streams.

    copier = CudaCopier(torch.device("cuda", 0), cubins=Path("~/.cache/lmcache-sglang/cubins").expanduser())
    copier.copy(plan, host_layout, device_layout, stream=torch.cuda.current_stream())

    sources     the one .cu and its headers, which are also what the CPU runs
    compilers   NVRTC, and nvcc
    cubins      what they made, on disk
    build       which of these is used; `python -m lmcache_sglang.kernels.cuda` builds ahead of time
    driver      the calls of CUDA's driver
    prepared    a plan as launches, or as runs
    reach       which memory the GPU may touch
    choice      kernel or copy engine, and on how much of the GPU
    layered     a copy a layer at a time
    staging     memory for the tables of launches under way
    copier      all of it together

Nothing here imports torch or CUDA before it is used. Where they are missing, `CudaUnavailableError` says what would
help, and the caller goes on with the engine's own kernels.
"""

from __future__ import annotations

from ...errors import CudaError, CudaUnavailableError
from .copier import CudaCopier
from .layered import LayeredCopy

__all__ = ["CudaCopier", "CudaError", "CudaUnavailableError", "LayeredCopy"]
