"""What in a usable peer-sharing file is probably not meant."""

from __future__ import annotations

from collections.abc import Iterator

from .addresses import parse
from .messages import FRAME_MOST
from .settings import PeerSettings

DEADLINE_LEAST = 0.05  # seconds in which a page may be expected to come


def advice(settings: PeerSettings) -> list[str]:
    """A line for each, which begins with the setting's name."""
    return [*_of_roles(settings), *_of_encryption(settings), *_of_limits(settings)]


def _of_roles(settings: PeerSettings) -> Iterator[str]:
    for setting in settings.own_entries:
        yield f"{setting}: this is the node itself; it is left out"
    knows_nobody = not settings.known and settings.dns is None
    if not settings.listen and knows_nobody:
        yield "listen: it is empty, and nobody is listed: this node neither serves nor reads"
    elif not settings.listen:
        yield "listen: it is empty: this node reads from others and serves nobody"
    elif knows_nobody:
        yield "peers: neither peers, seeds nor dns: this node serves, and reads from those that connect"
    if settings.listen and not (settings.share.enabled and settings.share.models):
        yield "share: nothing is shared: others find no page here"
    if settings.listen and settings.dns is None and settings.allowed == {settings.own_key}:
        yield "allow: it is empty, and no peer is listed: nobody else may connect"


def _of_encryption(settings: PeerSettings) -> Iterator[str]:
    if settings.is_encrypted and settings.insecure:
        yield "insecure: it has no effect: there is a key, and all is encrypted"
    elif settings.insecure:
        yield (
            "insecure: nothing is encrypted: who can reach this node can read its pages, and answer in "
            "a peer's place"
        )
    if settings.is_encrypted and settings.dns is not None and settings.dns.key != settings.own_key:
        yield "dns.key: nodes under that name share a key, and it is not this node's"
    advertise = settings.advertise
    if advertise is not None and parse(advertise).is_local and not _is_local(settings):
        yield f"advertise: {advertise} leads other machines back to themselves"
    if not settings.is_encrypted and "streams" in settings.limits.model_fields_set:
        yield "limits.streams: it has no effect: without encryption one connection is enough"


def _is_local(settings: PeerSettings) -> bool:
    return all(parse(text).is_local for text in settings.listen)


def _of_limits(settings: PeerSettings) -> Iterator[str]:
    limits = settings.limits
    if limits.window > limits.in_flight:
        yield (
            "limits.window: it is more than limits.in_flight: a peer with the same limits never has so "
            "much on its way"
        )
    if limits.deadline < DEADLINE_LEAST:
        yield f"limits.deadline: hardly a page comes within {limits.deadline:g} s"
    if 0 < limits.bandwidth * limits.deadline < FRAME_MOST:
        yield (
            "limits.bandwidth: a page of 8 MiB takes longer than limits.deadline, after which a peer "
            "with the same limits gives up"
        )
