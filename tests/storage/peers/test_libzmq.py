"""What is done to the process when libzmq is looked up."""

from __future__ import annotations

import subprocess
import sys

FRAME, FRAMES = 1 << 20, 64
FAULTS_MOST = 2 * FRAME // 4096  # of all the frames together; else each costs half as many

_FRAMES_COME_AND_GO = f"""
import ctypes
import resource
import threading

from lmcache_sglang.storage.peers.libzmq import libzmq

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]


def come_and_go():
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range({FRAMES}):
        frame = libc.malloc({FRAME})
        libc.memset(frame, 1, {FRAME})
        libc.free(frame)
    print(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)


libzmq()
thread = threading.Thread(target=come_and_go)  # whose arena is its own, as that of an I/O thread
thread.start()
thread.join()
"""


def test_memory_of_frames_is_kept_for_the_next_ones() -> None:
    command = [sys.executable, "-c", _FRAMES_COME_AND_GO]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    assert int(done.stdout) < FAULTS_MOST
