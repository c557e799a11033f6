"""The functions of libzmq for the native side: those of the library whose sockets pyzmq makes.

A socket works only with the library that made it, and pyzmq brings one of its own, under a name that changes. So
the addresses are asked of pyzmq's own extension: looking a symbol up in it finds those of its libraries.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache

import zmq
import zmq.backend

from ...errors import ConfigError
from .._native import Libzmq

OLDEST = (4, 2)  # whose messages are 64 bytes, as all since
KEPT_BLOCK = (32 << 20) - (64 << 10)  # bytes: below the most that glibc learns from, with its head

_FUNCTIONS = (
    "zmq_msg_init",
    "zmq_msg_init_size",
    "zmq_msg_init_data",
    "zmq_msg_recv",
    "zmq_msg_send",
    "zmq_msg_close",
    "zmq_msg_data",
    "zmq_msg_size",
    "zmq_msg_more",
    "zmq_poll",
    "zmq_errno",
)


@cache
def libzmq() -> Libzmq:
    """Raises: ConfigError: pyzmq is of a build whose library cannot be reached, or too old."""
    if zmq.zmq_version_info()[:2] < OLDEST:
        raise _unusable(f"libzmq {zmq.zmq_version()} is older than 4.2")
    extension = sys.modules[zmq.backend.Socket.__module__].__file__
    try:
        library = ctypes.CDLL(extension)
        functions = {name: _address(library, name) for name in _FUNCTIONS}
    except (OSError, AttributeError) as error:
        raise _unusable(f"its libzmq cannot be reached through {extension}: {error}") from error
    _keep_freed_memory()
    return Libzmq(functions)


def _keep_freed_memory() -> None:
    """Have malloc keep the memory of frames for the next ones.

    libzmq allocates each frame that comes. From 128 KiB on glibc maps every block anew, and the kernel blanks it page
    by page: up to 40,000 faults a GB. Once a mapped block was freed, glibc maps only larger ones, and gives memory
    back from twice its size on (mallopt(3), M_MMAP_THRESHOLD); so does it after this one, unless the process was told
    otherwise (MALLOC_MMAP_THRESHOLD_), which stays as it is. To other allocators it means nothing.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.free.restype = None
    libc.free(libc.malloc(KEPT_BLOCK))


def _address(library: ctypes.CDLL, name: str) -> int:
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0


def _unusable(problem: str) -> ConfigError:
    return ConfigError(
        "peers", f"{problem}; install pyzmq with its Cython backend (pip install -U pyzmq)"
    )
