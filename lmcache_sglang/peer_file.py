"""The peer-sharing file (peers.yaml): read at start, and again when it changes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from .config import read_file
from .errors import ConfigError
from .storage.peers.keys import KeyReader
from .storage.peers.settings import PeerSettings
from .storage.peers.watched import Stamp, Watched

SETTING = "peers"  # of the main settings, which names the file


@dataclass(frozen=True, slots=True)
class Unchanged:
    """The settings in force are those of the file."""


@dataclass(frozen=True, slots=True)
class Changed:
    """Other settings are in force now.

    Attributes:
        settings: those; what takes a restart is as it was.
        restart: settings of the file that wait for one.
    """

    settings: PeerSettings
    restart: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """The file changed and cannot be used; what was in force stays."""

    error: ConfigError


Outcome: TypeAlias = Unchanged | Changed | Refused


class PeerFile:
    """The file, and all key files it names. For one thread.

    Args:
        path: of a YAML, JSON or TOML file; relative paths in it begin in its folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._watched = Watched()
        self._seen: dict[Path, Stamp] = {}  # at the last look
        self._settings: PeerSettings | None = None

    @property
    def settings(self) -> PeerSettings:
        """Those in force; `load` comes first."""
        if self._settings is None:
            raise RuntimeError("load() comes first")
        return self._settings

    def load(self) -> PeerSettings:
        """Raises: ConfigError: of ``peers``; says which setting of the file, and the fix."""
        self._settings = self._read()
        return self._settings

    def changed(self) -> Outcome:
        """Look whether any of the files changed. Each change is told once, when two looks find the same: a file that
        is still being written may make sense, and another one than it will."""
        before = self.settings
        now = self._watched.now()
        is_settled, self._seen = now == self._seen, now
        if not is_settled or not self._watched.has_changed():
            return Unchanged()
        try:
            settings, restart = self._following(before)
        except ConfigError as error:
            return Refused(error)
        self._settings = settings
        return Changed(settings, restart) if restart or settings != before else Unchanged()

    def _following(self, before: PeerSettings) -> tuple[PeerSettings, tuple[str, ...]]:
        now = self._read()
        try:
            return now.following(before)
        except ConfigError as error:
            raise self._named(error) from error

    def _read(self) -> PeerSettings:
        """Files are watched from before they are read, also where they turn out to be wrong."""
        reader = KeyReader(self.path.parent)
        self._watched = reader.watched
        self._watched.note(self.path)
        written = read_file(self.path, SETTING)
        try:
            return PeerSettings.of(written, reader)
        except ConfigError as error:
            raise self._named(error) from error

    def _named(self, error: ConfigError) -> ConfigError:
        return ConfigError(SETTING, f"{self.path}: {error}")
