"""A network of its own for each process, and between them a cable that can be slow, lossy or cut.

    with Cable(folder / "cable", delay=0.02, loss=0.01) as cable:
        job = Job(serve, "10.9.0.1", cable.path)  # calls `plug_in` first
        cable.cut("10.9.0.1")

A process that plugs in leaves its network for a new namespace whose one interface is a TUN device, and hands the other
end of it to the cable: a thread here that carries IP packets from one to the other. TCP and what is above it are the
kernel's own. Nothing is left behind: a namespace goes with its last process. It needs no `tc netem`, which many
kernels lack, and every packet can be seen on its way.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import selectors
import socket
import struct
import time
from collections.abc import Callable
from ipaddress import IPv4Address
from pathlib import Path
from random import Random
from threading import Event, Lock, Thread
from types import TracebackType
from typing import Self

NAME = b"cable"  # of the interface
PREFIX = 24  # bits of the addresses that all nodes have in common
MTU = 9000  # bytes; fewer packets than with 1,500, as Python carries them
TUN = Path("/dev/net/tun")

# Of <sched.h>, <linux/if_tun.h>, <linux/sockios.h> and <net/if.h>.
CLONE_NEWNET, CLONE_NEWUSER = 0x40000000, 0x10000000
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
SIOCSIFADDR, SIOCSIFNETMASK, SIOCSIFMTU = 0x8916, 0x891C, 0x8922

_libc = ctypes.CDLL(None, use_errno=True)


class NoNamespaces(RuntimeError):
    """This machine does not let this process have a network of its own; the message says what it refused."""


class Cable:
    """The cable, and the thread that carries.

    Args:
        path: of the socket at which processes plug in; made here.
        delay: seconds that a packet takes.
        loss: the fraction of packets that are lost.
        seed: of the choice which.
        on_packet: is shown each packet that is sent, also one that is lost.
    """

    def __init__(
        self,
        path: Path,
        *,
        delay: float = 0.0,
        loss: float = 0.0,
        seed: int = 0,
        on_packet: Callable[[bytes], None] = lambda _: None,
    ) -> None:
        self.path = path
        self.carried = self.lost = 0  # packets
        self._delay, self._loss, self._random = delay, loss, Random(seed)
        self._on_packet = on_packet
        self._ends: dict[IPv4Address, int] = {}
        self._cut: set[IPv4Address] = set()
        self._lock = Lock()  # of the two above
        self._under_way: list[tuple[float, int, bytes]] = []
        self._selector = selectors.DefaultSelector()
        self._plugs = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._plugs.bind(str(path))
        self._plugs.listen(64)
        self._selector.register(self._plugs, selectors.EVENT_READ)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._stop = Event()
        self._thread = Thread(target=self._run, name="cable", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._selector.close()
        self._plugs.close()
        for end in (self._wake, *self._ends.values()):
            os.close(end)

    def cut(self, address: str) -> None:
        """From here on nothing reaches this node or leaves it. What is under way is lost, too."""
        with self._lock:
            self._cut.add(IPv4Address(address))

    def mend(self, address: str) -> None:
        with self._lock:
            self._cut.discard(IPv4Address(address))

    # The thread.

    def _run(self) -> None:
        while not self._stop.is_set():
            wait = self._under_way[0][0] - time.monotonic() if self._under_way else None
            for key, _ in self._selector.select(None if wait is None else max(0.0, wait)):
                if key.fileobj is self._plugs:
                    self._take_end()
                elif key.fileobj != self._wake:
                    self._take_packet(key.fd)
            self._deliver(time.monotonic())

    def _take_end(self) -> None:
        with self._plugs.accept()[0] as plug:
            said, ends, _, _ = socket.recv_fds(plug, 4, 1)
            (end,) = ends
            os.set_blocking(end, False)
            with self._lock:
                old = self._ends.pop(IPv4Address(said), None)
                self._ends[IPv4Address(said)] = end
            if old is not None:  # of a process that has ended
                self._unplug(old)
            self._selector.register(end, selectors.EVENT_READ)
            plug.send(b"!")

    def _unplug(self, end: int) -> None:
        self._selector.unregister(end)
        os.close(end)

    def _take_packet(self, end: int) -> None:
        try:
            packet = os.read(end, MTU)
        except BlockingIOError:
            return
        except OSError:  # its namespace has ended
            with self._lock:
                self._ends = {a: each for a, each in self._ends.items() if each != end}
            self._unplug(end)
            return
        self._on_packet(packet)
        if self._random.random() < self._loss:
            self.lost += 1
        else:
            due = time.monotonic() + self._delay
            heapq.heappush(self._under_way, (due, self.carried + self.lost, packet))
            self.carried += 1

    def _deliver(self, now: float) -> None:
        while self._under_way and self._under_way[0][0] <= now:
            _, _, packet = heapq.heappop(self._under_way)
            source, to = IPv4Address(packet[12:16]), IPv4Address(packet[16:20])
            with self._lock:
                end = None if self._cut & {source, to} else self._ends.get(to)
            if end is None:
                continue
            try:
                os.write(end, packet)
            except OSError:  # its process has just ended; the read sees it, too
                self.lost += 1


def plug_in(address: str, cable: Path) -> None:
    """Leave this process's network for one whose only way out is the cable. For all of the process, and for good:
    to be called before it has threads.

    Raises:
        NoNamespaces: what the machine refuses.
    """
    _unshare_network()
    try:
        end = os.open(TUN, os.O_RDWR)
    except OSError as error:
        raise NoNamespaces(f"{TUN}: {error.strerror}") from error
    try:
        fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", NAME, IFF_TUN | IFF_NO_PI))
        _configure(IPv4Address(address))
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as plug:
            plug.connect(str(cable))
            socket.send_fds(plug, [IPv4Address(address).packed], [end])
            plug.recv(1)
    except OSError as error:
        raise NoNamespaces(f"a TUN device in a new network namespace: {error.strerror}") from error
    finally:
        os.close(end)


def why_not() -> str:
    """Why this process cannot plug in, empty if it can. Only to be asked in a process of its own."""
    try:
        _unshare_network()
        with TUN.open("rb+", buffering=0) as end:
            fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", NAME, IFF_TUN | IFF_NO_PI))
    except NoNamespaces as refused:
        return str(refused)
    except OSError as error:
        return f"{TUN}: {error.strerror}"
    return ""


def _unshare_network() -> None:
    """Who is not root may do it in a user namespace of his own, where the machine lets him."""
    user = os.getuid()
    if _libc.unshare(CLONE_NEWNET) == 0:
        return
    if _libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
        raise NoNamespaces(f"a network namespace: {os.strerror(ctypes.get_errno())}")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")


def _configure(address: IPv4Address) -> None:
    """Raises: OSError."""
    mask = IPv4Address((1 << 32) - (1 << (32 - PREFIX)))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:

        def set_on(name: bytes, what: int, value: bytes) -> None:
            fcntl.ioctl(any_socket, what, struct.pack("16s24s", name, value))

        def up(name: bytes) -> None:
            answer = fcntl.ioctl(any_socket, SIOCGIFFLAGS, struct.pack("16s24x", name))
            (flags,) = struct.unpack_from("16xH", answer)
            set_on(name, SIOCSIFFLAGS, struct.pack("H", flags | IFF_UP))

        for what, given in ((SIOCSIFADDR, address), (SIOCSIFNETMASK, mask)):
            set_on(NAME, what, struct.pack("HH4s", socket.AF_INET, 0, given.packed))
        set_on(NAME, SIOCSIFMTU, struct.pack("i", MTU))
        up(b"lo")
        up(NAME)
