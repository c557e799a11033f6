"""CURVE keys in files, in the format of pyzmq's certificates (zmq.auth).

NAME.key has the public key and may be read by all; NAME.key_secret has both, and may be read by its owner alone.
Keys are Z85 text of 40 characters (https://rfc.zeromq.org/spec/32/).
"""

from __future__ import annotations

import os
import re
import stat
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from ...errors import ConfigError
from .watched import Watched

PUBLIC_SUFFIX = ".key"
SECRET_SUFFIX = ".key_secret"
PUBLIC_MODE = 0o644
SECRET_MODE = 0o600
OTHERS = 0o077  # all that is not the owner's
KEY_CHARACTERS = 40
FINGERPRINT_CHARACTERS = 8
FILE_MOST = 64 << 10  # bytes
KEYGEN = "`lmcache-sglang keygen` makes one"

_Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
_DIGITS = {character: digit for digit, character in enumerate(_Z85)}
_LINE = re.compile(r"^\s*(public-key|secret-key)\s*=\s*[\"']?(\S*?)[\"']?\s*$", re.MULTILINE)


def is_key(text: str) -> bool:
    """Whether it is 40 characters of Z85 for 32 bytes."""
    if len(text) != KEY_CHARACTERS or not all(character in _DIGITS for character in text):
        return False
    groups = (text[at : at + 5] for at in range(0, KEY_CHARACTERS, 5))
    return all(_number(group) < 1 << 32 for group in groups)


def _number(group: str) -> int:
    number = 0
    for character in group:
        number = 85 * number + _DIGITS[character]
    return number


def fingerprint(public: str) -> str:
    """Enough of a public key for a person to tell it from others; no proof of anything."""
    return public[:FINGERPRINT_CHARACTERS]


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A node's keys. Both empty, and false: it has none, and nothing is encrypted."""

    public: str
    secret: str = field(repr=False)

    def __bool__(self) -> bool:
        return bool(self.public)

    @classmethod
    def load(cls, path: Path, setting: str = "key") -> KeyPair:
        """Read a secret key file.

        Args:
            setting: what named it, for the message.

        Raises:
            ConfigError: it cannot be read, is not this node's alone, or has no secret key or a wrong one.
        """
        keys = _read(path, setting, secret=True)
        public, secret = keys.get("public-key", ""), keys.get("secret-key", "")
        if is_key(public) and not secret:
            raise ConfigError(
                setting, f"{path} has a public key only; give the {SECRET_SUFFIX} file beside it"
            )
        if not is_key(public) or not is_key(secret):
            raise ConfigError(setting, f"{path} is no secret key file; {KEYGEN}")
        if zmq.curve_public(secret.encode()).decode() != public:
            raise ConfigError(setting, f"the two keys in {path} are not a pair; {KEYGEN}")
        return cls(public, secret)

    @classmethod
    def new(cls) -> KeyPair:
        """Other ones each time."""
        while True:
            public, secret = (key.decode() for key in zmq.curve_keypair())
            if not public.endswith(PUBLIC_SUFFIX):  # settings would take it for a file
                return cls(public, secret)


NO_KEYS = KeyPair("", "")


def public_key(text: str, folder: Path = Path(), setting: str = "key") -> str:
    """A public key that is written as itself, or as the path of its file.

    Args:
        folder: that a relative path begins in.
        setting: what named it, for the message.

    Raises:
        ConfigError: it is neither, or the file has no public key, or a secret one.
    """
    path = folder / text
    if _is_key_itself(text, path):
        return text
    if not text.endswith(PUBLIC_SUFFIX) and not _mode(path):
        raise ConfigError(
            setting,
            f"{text!r} is neither a public key (40 characters of Z85) nor a file in {path.parent}; "
            f"{KEYGEN} and prints it",
        )
    keys = _read(path, setting, secret=False)
    if "secret-key" in keys:
        raise ConfigError(
            setting,
            f"{path} has a secret key, which stays on its node; give the {PUBLIC_SUFFIX} file",
        )
    if not is_key(keys.get("public-key", "")):
        raise ConfigError(setting, f"{path} is no public key file; {KEYGEN}")
    return keys["public-key"]


def _is_key_itself(text: str, path: Path) -> bool:
    """A path can look like a key; one that ends as keys' files do, or that is there, is a path."""
    return is_key(text) and not text.endswith(PUBLIC_SUFFIX) and not _mode(path)


class KeyReader:
    """Reads the keys that a settings file names, and notes which files they came from.

    Args:
        folder: that relative paths begin in.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.watched = Watched()

    def pair(self, text: str) -> KeyPair:
        """Raises: ConfigError."""
        path = self.folder / text
        self.watched.note(path)
        return KeyPair.load(path)

    def public(self, text: str) -> str:
        """Raises: ConfigError."""
        path = self.folder / text
        if not _is_key_itself(text, path):
            self.watched.note(path)
        return public_key(text, self.folder)

    def publics(self, text: str) -> list[str]:
        """The key that a text is, or names, or those in a folder of public key files.

        Raises: ConfigError.
        """
        path = self.folder / text
        if not stat.S_ISDIR(_mode(path)):
            return [self.public(text)]
        self.watched.note(path)
        files = sorted(path.glob(f"*{PUBLIC_SUFFIX}"))
        if not files:
            raise ConfigError("allow", f"{path} has no {PUBLIC_SUFFIX} files")
        return [self.public(str(file)) for file in files]


def _read(path: Path, setting: str, *, secret: bool) -> dict[str, str]:
    """What a certificate says.

    Raises:
        ConfigError: it cannot be read; or it is to be secret, and others may read it.
    """
    opened = _open(path, setting)
    try:
        found = os.fstat(opened)
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(setting, f"{path} is no file")
        if secret and found.st_mode & OTHERS:
            mode = stat.S_IMODE(found.st_mode)
            raise ConfigError(
                setting, f"others may read {path} (mode {mode:04o}); make it yours alone: chmod 600"
            )
        text = os.read(opened, FILE_MOST)
    except OSError as error:
        raise ConfigError(setting, f"cannot read {path}: {error.strerror}") from error
    finally:
        os.close(opened)
    return dict(_LINE.findall(text.decode("utf-8", "replace")))


def _open(path: Path, setting: str) -> int:
    try:
        # Not to wait for a pipe's other end.
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise ConfigError(setting, f"there is no {path}; {KEYGEN}") from error
    except OSError as error:
        raise ConfigError(setting, f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # a NUL
        raise ConfigError(setting, f"{str(path)!r} is no path") from error


def _mode(path: Path) -> int:
    """0: there is none, or it cannot be asked."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return 0


@dataclass(frozen=True, slots=True)
class KeyFiles:
    """The two files of a pair."""

    public: Path
    secret: Path

    @classmethod
    def of(cls, folder: Path, name: str) -> KeyFiles:
        return cls(folder / f"{name}{PUBLIC_SUFFIX}", folder / f"{name}{SECRET_SUFFIX}")

    def write(self, pair: KeyPair, *, force: bool = False) -> None:
        """Make both, each at once and whole; nobody else may read the secret one at any time.

        Args:
            force: also in the place of files that are there.

        Raises:
            FileExistsError: one of them is there; nothing was changed.
            OSError: they cannot be written.
        """
        self.secret.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not force:
            for path in (self.public, self.secret):
                if os.path.lexists(path):
                    raise FileExistsError(f"{path} is there already")
        _write(self.secret, SECRET_MODE, _certificate(pair, secret=True), force=force)
        try:
            _write(self.public, PUBLIC_MODE, _certificate(pair, secret=False), force=force)
        except OSError:
            if not force:
                self.secret.unlink()
            raise


def _certificate(pair: KeyPair, *, secret: bool) -> str:
    says = "SECRET key of a node: it stays there" if secret else "Public key of a node"
    lines = [f"# {says}. Made by lmcache-sglang keygen, for ZeroMQ's CURVE.", "metadata", "curve"]
    lines.append(f'    public-key = "{pair.public}"')
    if secret:
        lines.append(f'    secret-key = "{pair.secret}"')
    return "\n".join(lines) + "\n"


def _write(path: Path, mode: int, text: str, *, force: bool) -> None:
    """Raises: FileExistsError: it is there, and was not there before."""
    # mkstemp opens with O_EXCL and 0600.
    opened, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(opened, "w", encoding="ascii") as file:
            file.write(text)
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        if force:
            temporary.replace(path)
        else:
            path.hardlink_to(temporary)  # unlike a rename, never in another file's place
    finally:
        temporary.unlink(missing_ok=True)
