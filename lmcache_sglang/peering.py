"""From settings to other nodes: the tier that an engine reads through, and what keeps it up to date."""

from __future__ import annotations

import logging
import os
import stat
from contextlib import ExitStack
from pathlib import Path
from threading import Event, Thread

from .config import Config
from .errors import ConfigError
from .peer_file import Changed, PeerFile
from .peer_guardian import Guardian
from .storage.peers.keys import NO_KEYS
from .storage.peers.settings import PeerSettings
from .storage.peers.tier import PeerLimits, PeerTier
from .storage.peers.told import Teller

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.25  # between looks at the peer-sharing file, at whose directory there is, and at what peers send


def folder_of(config: Config) -> Path:
    """Where this node's processes meet: beside the CPU tier, in shared memory."""
    memory = config.cpu.directory(config.directory)
    return memory.with_name(f"{memory.name}-peers")


def made_folder(config: Config) -> Path:
    """The same, there, and nobody else's: who can write to it can tell us whom to connect to.

    Raises:
        ConfigError: it cannot be made, or is somebody else's.
    """
    folder = folder_of(config)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise ConfigError("cpu.path", f"cannot make {folder}: {error.strerror}") from error
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
        raise ConfigError(
            "cpu.path", f"{folder} can be written to by others; delete it, or give another cpu.path"
        )
    return folder


def limits_of(settings: PeerSettings) -> PeerLimits:
    limits = settings.limits
    return PeerLimits(
        deadline=limits.deadline,
        window=int(limits.window),
        streams=limits.streams if settings.is_encrypted else 1,
        keep=settings.keep,
    )


class Peering(PeerTier):
    """Other nodes' pages, for an engine: the tier, the node's agent if this process is to run it, and a thread that
    looks at the peer-sharing file and at the directory, so that no lookup has to.

    Raises:
        ConfigError: names the setting that cannot be used.
    """

    def __init__(self, config: Config, path: Path) -> None:
        file = PeerFile(path)
        settings = file.load()
        folder = made_folder(config)
        with ExitStack() as undo:
            self._guardian = Guardian(config, path, folder)
            undo.callback(self._guardian.close)
            teller = Teller(folder)
            undo.callback(teller.close)
            super().__init__(
                folder, settings.key or NO_KEYS, limits_of(settings), teller.tell, refreshed=True
            )
            self._undo = undo.pop_all()
        self._stop = Event()
        self._watch = Thread(
            target=self._follow, args=(file,), name="lmcache-peers-file", daemon=True
        )
        self._watch.start()

    def _follow(self, file: PeerFile) -> None:
        """What is wrong with the file the agent says, which follows it, too."""
        while not self._stop.wait(LOOK_SECONDS):
            self.refresh()
            self.meter()
            outcome = file.changed()
            if isinstance(outcome, Changed):
                self.limits = limits_of(outcome.settings)

    def close(self) -> None:
        self._stop.set()
        self._watch.join()
        super().close()
        self._undo.close()
