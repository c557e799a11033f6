"""Where a node answers: ``tcp://HOST:PORT`` or ``ipc:///PATH``, as ZeroMQ writes it."""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

WANTED = "give tcp://HOST:PORT or ipc:///PATH"
ADDRESS_MOST = 256  # characters; Address in messages.py
IPC_MOST = 107  # bytes of a path: sun_path of unix(7), and its end
ELSEWHERE = {  # of RFC 5737 and RFC 3849: nobody's, and so behind the default route
    socket.AF_INET: "192.0.2.1",
    socket.AF_INET6: "2001:db8::1",
}

_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST = re.compile(rf"{_LABEL}(\.{_LABEL})*\.?")


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """Attributes: host: an IP address, or a host's name in small letters. port: 0: the system chooses one."""

    host: str
    port: int

    @property
    def ip(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
        """None: the host is a name."""
        try:
            found = ipaddress.ip_address(self.host)
        except ValueError:
            return None
        return getattr(found, "ipv4_mapped", None) or found

    @property
    def is_wildcard(self) -> bool:
        return self.ip is not None and self.ip.is_unspecified

    @property
    def is_local(self) -> bool:
        """Whether what travels there stays on this machine."""
        return self.host == "localhost" if self.ip is None else self.ip.is_loopback

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class IpcAddress:
    """A socket in the file system."""

    path: Path

    is_wildcard = False
    is_local = True

    def __str__(self) -> str:
        return f"ipc://{self.path}"


Address: TypeAlias = TcpAddress | IpcAddress


def parse(text: str) -> Address:
    """Raises: ValueError: says what is wrong with it."""
    if len(text) > ADDRESS_MOST:
        raise ValueError(f"an address has at most {ADDRESS_MOST} characters; {WANTED}")
    scheme, _, rest = text.partition("://")
    match scheme:
        case "tcp":
            return _tcp(text, rest)
        case "ipc":
            return _ipc(text, rest)
    raise ValueError(f"{text!r} is no address; {WANTED}")


def parse_listen(text: str) -> Address:
    """An address that a socket can be bound to. Raises: ValueError."""
    address = parse(text)
    if isinstance(address, TcpAddress) and address.ip is None:
        raise ValueError(f"{text!r} names a host; give one of its IP addresses, or 0.0.0.0 for all")
    return address


def parse_reachable(text: str) -> Address:
    """An address that others can connect to. Raises: ValueError."""
    address = parse(text)
    if address.is_wildcard:
        raise ValueError(f"{text!r} is every address of a host; give one that leads to it")
    if isinstance(address, TcpAddress) and address.port == 0:
        raise ValueError(f"{text!r} names no port; give one from 1 to 65535")
    return address


def outward_host(families: tuple[socket.AddressFamily, ...] = tuple(ELSEWHERE)) -> str:
    """The IP address that this machine is seen under; no packet is sent to find it.

    It is the one that the default route begins at, or else one that the host's name has.

    Raises:
        OSError: there is none but loopback's.
    """
    for family in families:
        host = _at_default_route(family)
        if host and not ipaddress.ip_address(host).is_loopback:
            return host
    name = socket.gethostname()
    for family, *_, where in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM):
        if family in families and not ipaddress.ip_address(where[0]).is_loopback:
            return str(where[0])
    raise OSError(f"there is no default route, and {name} has no address but loopback's")


def _at_default_route(family: socket.AddressFamily) -> str:
    """Empty: there is no such route."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((ELSEWHERE[family], 9))
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def _tcp(text: str, rest: str) -> TcpAddress:
    host, colon, digits = rest.rpartition(":")
    if not colon or not re.fullmatch(r"[0-9]{1,5}", digits) or int(digits) > 65535:
        raise ValueError(
            f"{text!r} has no port; give tcp://HOST:PORT, for example {_example(rest)}"
        )
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if ":" in host and bare == host:
        raise ValueError(f"{text!r}: an IPv6 address stands in brackets: tcp://[{host}]:{digits}")
    return TcpAddress(_host(text, bare, bracketed=bare != host), int(digits))


def _example(rest: str) -> str:
    host = rest.split(":")[0]
    return f"tcp://{host}:7801" if _HOST.fullmatch(host) else "tcp://10.0.0.7:7801"


def _host(text: str, host: str, *, bracketed: bool) -> str:
    """As it is written by all."""
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        found = None
    if found is not None and bracketed == (found.version == 6):
        return str(found)
    # A name of digits alone would be an IP address, or one with a slip of the hand.
    if found is None and _HOST.fullmatch(host) and not re.fullmatch(r"[0-9.]+", host):
        return host.lower()
    if host == "*":
        raise ValueError(f"{text!r}: give 0.0.0.0 for all IPv4 addresses, or [::] for all")
    raise ValueError(f"{text!r}: {host!r} is no host; {WANTED}")


def _ipc(text: str, rest: str) -> IpcAddress:
    if not rest.startswith("/"):
        raise ValueError(f"{text!r} has a relative path; give ipc:///PATH with three slashes")
    if len(rest.encode("utf-8", "surrogatepass")) > IPC_MOST or "\0" in rest:
        raise ValueError(f"{text!r}: the path of a socket has at most {IPC_MOST} bytes")
    return IpcAddress(Path(rest))
