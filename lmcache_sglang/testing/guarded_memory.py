"""Memory with an inaccessible page on both sides, so that one byte too far ends the process."""

from __future__ import annotations

import ctypes
import mmap
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

_LIBC = ctypes.CDLL(None, use_errno=True)
_NO_ACCESS = 0  # PROT_NONE


def guarded(size: int, *, at_end: bool = True) -> Tensor:
    """uint8 [size], which ends, or begins, where an inaccessible page begins, or ends."""
    room = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    area = mmap.mmap(-1, room + 2 * mmap.PAGESIZE)
    whole = torch.frombuffer(area, dtype=torch.uint8)
    start = whole.data_ptr()
    for guard in (start, start + mmap.PAGESIZE + room):
        if _LIBC.mprotect(ctypes.c_void_p(guard), mmap.PAGESIZE, _NO_ACCESS):
            raise OSError(ctypes.get_errno(), "mprotect")
    begin = mmap.PAGESIZE + (room - size if at_end else 0)
    return whole[begin : begin + size]
