"""Whether somebody listens at an address."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from enum import StrEnum

from ..storage.peers.addresses import IpcAddress, parse


class Reach(StrEnum):
    """What came of it."""

    OPEN = "open"
    REFUSED = "refused"  # the machine is there, and nobody listens
    UNREACHABLE = "unreachable"  # no such host, no way to it, or no answer in time


@dataclass(frozen=True, slots=True)
class Reached:
    """Attributes: detail: why not; empty: it is open."""

    reach: Reach
    detail: str = ""


def reachable(address: str, seconds: float) -> Reached:
    """Connect, and say nothing.

    Args:
        seconds: that each of a host's addresses may take.
    """
    parsed = parse(address)
    try:
        if isinstance(parsed, IpcAddress):
            with socket.socket(socket.AF_UNIX) as unix:
                unix.settimeout(seconds)
                unix.connect(str(parsed.path))
        else:
            socket.create_connection((parsed.host, parsed.port), seconds).close()
    except ConnectionRefusedError:
        return Reached(Reach.REFUSED, "nobody listens there")
    except FileNotFoundError:
        return Reached(Reach.REFUSED, "there is no such socket")
    except TimeoutError:
        return Reached(Reach.UNREACHABLE, f"no answer in {seconds:g} s")
    except (OSError, UnicodeError) as error:
        return Reached(Reach.UNREACHABLE, getattr(error, "strerror", None) or str(error))
    return Reached(Reach.OPEN)
