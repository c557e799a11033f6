"""``lmcache-sglang peers``: the peer-sharing file, explained."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..peer_file import PeerFile
from ..storage.peers import names
from ..storage.peers.advice import advice
from ..storage.peers.keys import fingerprint
from ..storage.peers.settings import PeerLimits, PeerSettings
from .reaching import Reach, reachable
from .sizes import size

if TYPE_CHECKING:
    from argparse import _SubParsersAction

EPILOG = """\
Says who this node is, where it listens and what it tells others, whom it knows and lets in, what that may cost
and what it shares. Lines that begin with "note" say what is probably not meant.

examples:
  lmcache-sglang peers check /etc/lmcache/peers.yaml
  lmcache-sglang peers check --connect --seconds 2 /etc/lmcache/peers.yaml

Exit status: 0: the file can be used; 1: it cannot, and one line on stderr says why.
"""


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    peers = subparsers.add_parser(
        "peers", help="nodes that share pages", description="Nodes that share pages."
    )
    commands = peers.add_subparsers(metavar="COMMAND", required=True)
    check = commands.add_parser(
        "check",
        help="explain the peer-sharing file",
        description="Read the peer-sharing file as a node would, and explain it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("file", type=Path, metavar="FILE", help="peers.yaml")
    check.add_argument(
        "--connect", action="store_true", help="try whether anybody listens at each address"
    )
    check.add_argument(
        "--seconds", type=_seconds, default=3.0, help="to wait for each (default: %(default)g)"
    )
    check.set_defaults(run=run_check)


def run_check(options: argparse.Namespace) -> int:
    """Explain the file. Returns the exit status. Raises: ConfigError."""
    settings = PeerFile(options.file).load()
    for line in explained(settings):
        print(line)
    if options.connect:
        _connect(settings, options.seconds)
    return 0


def explained(settings: PeerSettings) -> Iterator[str]:
    """The settings in force, a line each. Raises: ConfigError: there is nothing to advertise."""
    yield _line("node", settings.name)
    yield _line("listens at", ", ".join(settings.listen) or "nowhere: it only reads")
    yield _line("advertises", settings.advertised() or "nothing")
    yield _line("encryption", _encryption(settings))
    for peer in settings.known:
        yield _line(
            "peer" if peer.node else "seed", " ".join(_words(peer.node, peer.address, peer.key))
        )
    if (dns := settings.dns) is not None:
        looked_up = f"every {dns.every:g} s"
        yield _line("names", " ".join(_words(f"{dns.name}:{dns.port}", looked_up, dns.key)))
    yield _line("allows", _allowed(settings))
    yield from _limits(settings.limits)
    yield _line("shares", _shared(settings))
    yield _line("keeps", f"pages of peers: {settings.keep}")
    for each in advice(settings):
        yield _line("note", each)


def _line(what: str, says: str) -> str:
    return f"{what:<12}{says}"


def _words(name: str, address: str, key: str) -> Iterator[str]:
    yield from (word for word in (name, address) if word)
    yield f"key {fingerprint(key)}…" if key else "no key"


def _encryption(settings: PeerSettings) -> str:
    if settings.is_encrypted:
        return f"CURVE, own public key {settings.own_key}"
    return "none, also beyond this machine" if settings.insecure else "none, only on this machine"


def _allowed(settings: PeerSettings) -> str:
    if not settings.is_encrypted:
        return "anybody who can connect"
    others = sorted(settings.allowed - {settings.own_key})
    prints = "".join(f", {fingerprint(key)}…" for key in others)
    return f"{len(others) + 1} keys: its own{prints}"


def _limits(limits: PeerLimits) -> Iterator[str]:
    served = f"{size(limits.bandwidth)}/s" if limits.bandwidth else "as fast as it can"
    yield _line("serves", f"{served}, {size(limits.in_flight)} of memory,")
    yield _line("", f"{limits.requests} requests at once of each connection")
    yield _line("reads", f"{size(limits.window)} on the way, {limits.deadline:g} s at most,")
    yield _line("", f"{limits.streams} connections to a peer when encrypted")
    signs = f"a sign of life every {limits.ping:g} s, gone after {limits.silence:g} s without"
    yield _line("follows", f"{limits.peers} peers at most; {signs};")
    yield _line("", f"{size(limits.directory)} of memory for what they have")


def _shared(settings: PeerSettings) -> str:
    share = settings.share
    if not share.enabled or not share.models:
        return "nothing"
    least = f", chains of {share.minimum_prefix} pages and more" if share.minimum_prefix else ""
    namespaces = "all" if share.namespaces == ("*",) else ", ".join(share.namespaces) or "no"
    return f"models {', '.join(share.models)}; {namespaces} namespaces{least}"


def _connect(settings: PeerSettings, seconds: float) -> None:
    """A line for each address, as soon as it is known."""
    addresses = [each.address for each in settings.known] + _found(settings)
    is_open = 0
    for number, address in enumerate(addresses, 1):
        reached = reachable(address, seconds)
        is_open += reached.reach is Reach.OPEN
        detail = f" ({reached.detail})" if reached.detail else ""
        print(_line(f"{number}/{len(addresses)}", f"{address} {reached.reach}{detail}"), flush=True)
    print(_line("connected", f"to {is_open} of {len(addresses)}"))


def _found(settings: PeerSettings) -> list[str]:
    if settings.dns is None:
        return []
    match names.resolve(settings.dns.name, settings.dns.port):
        case names.Answer(addresses):
            print(_line("names", f"{settings.dns.name} has {len(addresses)} addresses"), flush=True)
            return sorted(addresses)
        case names.NoAnswer(reason):
            print(_line("names", f"{settings.dns.name}: {reason}"), flush=True)
    return []


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds up to 3600")
    return seconds
