"""This node, as others see it: tiers, directory, agent, made from settings. What the agent's process runs."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from threading import Event, Thread

import zmq

from .config import Config
from .errors import ConfigError, TierError
from .hicache.namespaces import Namespaces
from .peer_file import Changed, PeerFile, Refused
from .peering import made_folder
from .storage.chain import Chain
from .storage.peers.advice import advice
from .storage.peers.agent import Agent, Parts
from .storage.peers.auth import Doorkeeper
from .storage.peers.directory import HEADS_BYTES, Directory
from .storage.peers.holdings import Holdings
from .storage.peers.in_place import InPlace
from .storage.peers.keys import NO_KEYS
from .storage.peers.link import Times
from .storage.peers.membership import Known, Membership
from .storage.peers.messages import NAMESPACES_MOST
from .storage.peers.names import NameWatch
from .storage.peers.node import Identity
from .storage.peers.page_server import PageServer
from .storage.peers.serving import Serving
from .storage.peers.settings import ALL, DnsName, PeerSettings, Share
from .storage.peers.staging import Staging
from .storage.peers.tier import HEAD
from .storage.peers.told import Told
from .store import admission_of, open_tiers

logger = logging.getLogger(__name__)

IO_THREADS = 4
BIND_SECONDS = 5.0  # that the agent before this one may take to let go of the address
BIND_AGAIN_SECONDS = 0.2
LOOK_SECONDS = 1.0  # between looks at the peer-sharing file, and at which models there are
CLOSE_SECONDS = 1.0  # that the end may wait for what others will write anyway


class Shared:
    """Which namespaces others may see: by their digests, and by the names of their models.

    Args:
        namespaces: what is on record beside the tiers.
    """

    def __init__(self, namespaces: Namespaces, share: Share) -> None:
        self._namespaces = namespaces
        self.share = share
        self._models: dict[bytes, str] = {}
        self.look()

    def look(self) -> bool:
        """Take note of what has been put on record since; whether there was anything."""
        if not self._namespaces.refreshed():
            return False
        self._models = {kind.namespace: kind.model.name for kind in self._namespaces.kinds()}
        return True

    def __call__(self, namespace: bytes) -> bool:
        share = self.share
        if not share.enabled:
            return False
        if ALL not in share.namespaces and namespace.hex() not in share.namespaces:
            return False
        name = self._models.get(namespace, "")
        return any(pattern == ALL or fnmatchcase(name, pattern) for pattern in share.models)

    def listed(self) -> list[bytes] | None:
        """The namespaces that are shared, as far as they are known; None: all."""
        share = self.share
        if share.enabled and ALL in share.namespaces and ALL in share.models:
            return None
        given = [bytes.fromhex(each) for each in share.namespaces if each != ALL]
        return [namespace for namespace in given or self._models if self(namespace)]


class PeerNode:
    """Everything that other nodes see of this one. `run` until `stop`, then `close`.

    Raises:
        ConfigError: names the setting that cannot be used.
    """

    def __init__(self, config: Config, file: PeerFile) -> None:
        self._file = file
        self._settings = file.load()
        for line in advice(self._settings):
            logger.warning("lmcache: %s: %s", file.path, line)
        self._names: NameWatch | None = None
        with ExitStack() as undo:
            self._make(config, self._settings, undo)
            self._undo = undo.pop_all()

    def _make(self, config: Config, settings: PeerSettings, undo: ExitStack) -> None:
        folder, keys = made_folder(config), settings.key or NO_KEYS
        self._upper, self._lower = open_tiers(config)
        self._promotes = config.disk.promotion != "never"
        # Its keeper may be the one that does the node's background work, by the node's own policy.
        chain = Chain(self._upper, self._lower, admission=admission_of(config), promotion="never")
        undo.callback(chain.close, CLOSE_SECONDS)
        self._shared = Shared(Namespaces(chain.directories), settings.share)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(IO_THREADS)
        undo.callback(context.term)
        self._doorkeeper = Doorkeeper(context, settings.allowed) if keys else None
        if self._doorkeeper is not None:
            undo.callback(self._doorkeeper.close)
        self._pages = self._page_server(chain, settings)
        undo.callback(self._pages.close)
        directory = _directory(folder / HEAD, int(settings.limits.directory))
        undo.callback(directory.close)
        told = Told(folder)
        undo.callback(told.close)
        self._agent = self._bound(Parts(context, keys, directory, self._pages, told), settings)
        undo.callback(self._agent.close)
        self._share()
        self._follow_name(settings.dns)
        undo.callback(lambda: self._follow_name(None))
        self._ending = Event()
        self._following = Thread(target=self._follow, name="lmcache-peers-file", daemon=True)
        self._following.start()
        undo.callback(self._stop_following)

    def _page_server(self, chain: Chain, settings: PeerSettings) -> PageServer:
        limits = settings.limits
        serving = Serving(self._shared, limits.requests)
        # Where nothing is promoted for this node's engines, nothing is for peers either.
        below = self._lower if self._promotes else None
        staging = Staging(self._upper, below, self._shared)
        memory, rate = int(limits.in_flight), int(limits.bandwidth)
        in_place = InPlace(self._upper)
        return PageServer(chain, serving, staging, in_place, memory, rate, time.monotonic())

    def _bound(self, parts: Parts, settings: PeerSettings) -> Agent:
        """An agent that listens. The one before it may not have let go of the address yet."""
        address = settings.advertised()
        identity = Identity(settings.name, address, parts.keys.public)
        own = [each for each in (*settings.listen, address) if each]
        membership = Membership(own, parts.keys.public, settings.allowed, settings.limits.peers)
        membership.configure(self._known(settings), settings.allowed, settings.limits.peers)
        times = Times(settings.limits.ping, settings.limits.silence)
        until, pause = time.monotonic() + BIND_SECONDS, Event()
        while True:
            try:
                return Agent(parts, identity, membership, times, settings.listen)
            except zmq.ZMQError as error:
                if error.errno != zmq.EADDRINUSE or time.monotonic() > until:
                    where = ", ".join(settings.listen)
                    problem = f"cannot listen at {where}: {error}; give another address or port"
                    raise ConfigError("listen", problem) from error
            pause.wait(BIND_AGAIN_SECONDS)

    def _share(self) -> None:
        """Tell others of what is shared now."""
        tiers = [tier for tier in (self._upper, self._lower) if tier is not None]
        listed = self._shared.listed()
        self._agent.node.namespaces = (listed or [])[:NAMESPACES_MOST]
        self._agent.share(Holdings(tiers, listed, self._shared.share.minimum_prefix))

    def _known(self, settings: PeerSettings) -> list[Known]:
        """Who is in the file, and who is under the DNS name now."""
        dns, watch = settings.dns, self._names
        if dns is None or watch is None:
            return settings.known
        return settings.known + [Known(each, dns.key) for each in sorted(watch.addresses)]

    def _follow_name(self, dns: DnsName | None) -> None:
        before = self._names
        if before is not None:
            before.close()
        self._names = None
        if dns is not None:
            known = before.addresses if before and before.is_of(dns.name, dns.port) else frozenset()
            self._names = NameWatch(dns.name, dns.port, dns.every, self._on_names, known)
            self._names.start()

    def _on_names(self, _: frozenset[str]) -> None:
        """On the watch's thread."""
        self._agent.soon(lambda: self._take(self._settings))

    @property
    def addresses(self) -> list[str]:
        return list(self._settings.listen)

    def run(self) -> None:
        self._agent.run()

    def stop(self) -> None:
        """From another thread, or a signal's handler."""
        self._agent.stop()

    def close(self) -> None:
        self._undo.close()

    def _follow(self) -> None:
        """On a thread of its own, as a disk may hang: whether the file changed, or there are other models."""
        while not self._ending.wait(LOOK_SECONDS):
            match self._file.changed():
                case Changed(settings, restart):
                    self._agent.soon(partial(self._take, settings))
                    waits = f"; {', '.join(restart)} wait for a restart" if restart else ""
                    logger.info("lmcache: %s was read again%s", self._file.path, waits)
                case Refused(error):
                    logger.error("lmcache: %s; the settings before stay in force", error)
            if self._shared.look():
                self._agent.soon(self._share_if_listed)

    def _stop_following(self) -> None:
        self._ending.set()
        self._following.join(CLOSE_SECONDS)

    # On the agent's thread.

    def _share_if_listed(self) -> None:
        """There are other models than before."""
        if self._shared.listed() is not None:
            self._share()

    def _take(self, settings: PeerSettings) -> None:
        """Settings that were changed, but for those that need a restart."""
        limits = settings.limits
        self._pages.set_limits(int(limits.bandwidth), limits.requests)
        if self._doorkeeper is not None:
            self._doorkeeper.allowed = settings.allowed
        node = self._agent.node
        if _asked(settings.dns) != _asked(self._settings.dns):
            self._follow_name(settings.dns)
        node.membership.configure(self._known(settings), settings.allowed, limits.peers)
        node.set_times(Times(limits.ping, limits.silence))
        if settings.share != self._settings.share:
            self._shared.share = settings.share
            self._share()
        self._settings = settings


def _asked(dns: DnsName | None) -> tuple[str, int, float] | None:
    """What is looked up; another key of the nodes there is none of the look-up's business."""
    return None if dns is None else (dns.name, dns.port, dns.every)


def _directory(path: Path, most: int) -> Directory:
    try:
        return Directory.create(path, most + HEADS_BYTES)  # a power of two is one of words
    except (ValueError, TierError) as error:
        raise ConfigError("limits.directory", str(error)) from error
