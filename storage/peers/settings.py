"""The peer-sharing file: who this node is, whom it knows and lets in, what it shares, and how much of it.

peer_file.py in lmcache_sglang reads the file and looks whether it changed; docs/peers.md has every key.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    Field,
    InstanceOf,
    StringConstraints,
    ValidationError,
    ValidationInfo,
)

from ...errors import ConfigError
from ...sections import Bytes, Section, explain, switched
from .addresses import (
    Address,
    IpcAddress,
    TcpAddress,
    outward_host,
    parse,
    parse_listen,
    parse_reachable,
)
from .keys import KeyPair, KeyReader
from .membership import Known
from .messages import NODES_MOST

Model = TypeVar("Model", bound=BaseModel)

PORT = 7801
ALL = "*"
NAME = r"^[A-Za-z0-9._-]+$"

# What a running node cannot change. All else is taken over when the file changes.
RESTART = ("name", "listen", "advertise", "key", "limits.in_flight", "limits.directory")


def default_name() -> str:
    """What this machine is called, as far as a node may be called so."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:64] or "node"


def _one_or_more(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _listened(text: str) -> str:
    return str(parse_listen(text))


def _reachable(text: str) -> str:
    return str(parse_reachable(text))


def _reader(info: ValidationInfo) -> KeyReader:
    if not isinstance(info.context, KeyReader):
        raise TypeError("PeerSettings.of reads key files; give it their reader")
    return info.context


def _text(value: object, wanted: str) -> str:
    """Raises: ValueError, as all validators must: pydantic lets a TypeError pass."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text; give {wanted}, in quotes")  # noqa: TRY004  # pydantic's
    return value


def _pair(value: object, info: ValidationInfo) -> KeyPair | None:
    if value is None:
        return None
    try:
        return _reader(info).pair(_text(value, "the path of the secret key file"))
    except ConfigError as error:
        raise ValueError(error.problem) from error  # `explain` names the setting


def _public(value: object, info: ValidationInfo) -> str:
    try:
        return _reader(info).public(_text(value, "a public key, or the path of its file"))
    except ConfigError as error:
        raise ValueError(error.problem) from error


def _publics(value: object, info: ValidationInfo) -> tuple[str, ...]:
    items = _one_or_more(value)
    if not isinstance(items, list | tuple):
        raise ValueError(f"{value!r} is no list of public keys, files and folders")  # noqa: TRY004  # pydantic's
    try:
        read = [_reader(info).publics(_text(item, "a public key, or a path")) for item in items]
    except ConfigError as error:
        raise ValueError(error.problem) from error
    return tuple(key for keys in read for key in keys)


def _namespace(text: str) -> str:
    if text != ALL and not re.fullmatch(r"[0-9a-fA-F]{32}", text):
        raise ValueError(
            f'{text!r} is no namespace; give 32 hexadecimal digits, or "{ALL}" for all'
        )
    return text.lower()


Text = Annotated[str, Field(strict=True)]
Name = Annotated[Text, StringConstraints(min_length=1, max_length=64, pattern=NAME)]
Listened = Annotated[Text, AfterValidator(_listened)]
Reachable = Annotated[Text, AfterValidator(_reachable)]
PublicKey = Annotated[str, BeforeValidator(_public)]
Seconds = Annotated[float, Field(strict=True, gt=0, le=3600, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True)]
Switch = Annotated[bool, Field(strict=True)]


class PeerNode(Section):
    """A node that is known by name."""

    name: Name = Field(description="Its name in this node's logs.")
    address: Reachable = Field(description="Where it answers; a host's name is looked up.")
    key: PublicKey = Field(
        default="", description="Its public key, or the path of the file with it."
    )


class Seed(Section):
    """A node that is asked for all others."""

    address: Reachable = Field(description="Where it answers.")
    key: PublicKey = Field(
        default="", description="Its public key, or the path of the file with it."
    )


class DnsName(Section):
    """A name whose addresses are all peers."""

    name: Annotated[Text, StringConstraints(min_length=1, max_length=253)] = Field(
        description="The name, for example of a headless Kubernetes service."
    )
    port: Annotated[Count, Field(ge=1, le=65535)] = Field(
        default=PORT, description="The port they all answer at."
    )
    key: PublicKey = Field(
        default="", description="The public key that they share, or the path of its file."
    )
    every: Seconds = Field(default=30.0, description="Seconds between two looks.")


class PeerLimits(Section):
    """What peers may cost this node."""

    bandwidth: Annotated[Bytes, Field(lt=1 << 50)] = Field(
        default=ByteSize(0), description="Bytes a second that others get; 0: no limit."
    )
    in_flight: Annotated[Bytes, Field(ge=1 << 20, lt=1 << 40)] = Field(
        default=ByteSize(64 << 20), description="Memory for pages that are being sent."
    )
    window: Annotated[Bytes, Field(ge=1 << 16, lt=1 << 40)] = Field(
        default=ByteSize(16 << 20),
        description="Bytes that one connection may have on their way to this node.",
    )
    requests: Annotated[Count, Field(ge=1, le=1024)] = Field(
        default=16, description="Requests of one connection that are answered at once."
    )
    streams: Annotated[Count, Field(ge=1, le=16)] = Field(
        default=2, description="Connections to one peer when encrypted; each is one CPU's work."
    )
    deadline: Annotated[Seconds, Field(le=10)] = Field(
        default=5.0, description="Seconds that a read of peers may take."
    )
    ping: Seconds = Field(default=2.0, description="Seconds between two signs of life.")
    silence: Seconds = Field(
        default=6.0, description="Seconds without one, after which a peer is taken for gone."
    )
    directory: Annotated[Bytes, Field(ge=2 << 20, lt=1 << 40)] = Field(
        default=ByteSize(1 << 30), description="Memory for what peers say they have."
    )
    peers: Annotated[Count, Field(ge=1, le=NODES_MOST)] = Field(
        default=NODES_MOST, description="The most peers."
    )


class Share(Section):
    """What others may know of and read here."""

    enabled: Switch = Field(
        default=True, description="`share: false` says it, too: nothing is shared."
    )
    models: Annotated[
        tuple[Annotated[Text, StringConstraints(min_length=1)], ...], BeforeValidator(_one_or_more)
    ] = Field(default=(ALL,), description="Models, by name; * and ? stand for any letters.")
    namespaces: Annotated[
        tuple[Annotated[Text, AfterValidator(_namespace)], ...], BeforeValidator(_one_or_more)
    ] = Field(default=(ALL,), description='Namespaces: 32 hexadecimal digits each, or "*".')
    minimum_prefix: Annotated[Count, Field(ge=0)] = Field(
        default=0, description="Pages of the shortest chain that others are told of."
    )


class PeerSettings(Section):
    """The file. Keys are read already: public ones are their 40 characters, ours is the pair."""

    name: Name = Field(
        default_factory=default_name,
        description="This node's name, in logs and to its peers.",
    )
    listen: Annotated[tuple[Listened, ...], BeforeValidator(_one_or_more)] = Field(
        default=(f"tcp://0.0.0.0:{PORT}",),
        description="Where this node answers: one address or a list; none: it only reads.",
    )
    advertise: Reachable | None = Field(
        default=None, description="The address that others are told."
    )
    key: Annotated[InstanceOf[KeyPair] | None, BeforeValidator(_pair)] = Field(
        default=None, description="The path of this node's secret key file."
    )
    insecure: Switch = Field(
        default=False, description="Allow TCP to other machines without encryption."
    )
    peers: tuple[PeerNode, ...] = Field(default=(), description="Nodes that are known.")
    seeds: tuple[Seed, ...] = Field(
        default=(), description="Nodes that tell which others there are."
    )
    dns: DnsName | None = Field(default=None, description="A name whose addresses are all peers.")
    allow: Annotated[tuple[str, ...], BeforeValidator(_publics)] = Field(
        default=(), description="Public keys, or paths, of further nodes that may connect."
    )
    limits: PeerLimits = Field(default=PeerLimits(), description="What peers may cost this node.")
    share: Annotated[Share, BeforeValidator(switched)] = Field(
        default=Share(), description="What others may know of and read here."
    )
    keep: Literal["always", "second-hit", "never"] = Field(
        default="always", description="Which pages read from peers are kept here."
    )

    @classmethod
    def of(cls, settings: Mapping[str, Any], reader: KeyReader) -> PeerSettings:
        """The settings as the file says, with all files it names.

        Raises:
            ConfigError: names the key as the user wrote it, and the nearest valid one if it is unknown.
        """
        try:
            read = cls.model_validate(settings, context=reader)
        except ValidationError as error:
            raise explain(error, cls) from error
        read.require_usable()
        return read

    @property
    def is_encrypted(self) -> bool:
        return self.key is not None

    @property
    def own_key(self) -> str:
        """This node's public key; empty where nothing is encrypted."""
        return self.key.public if self.key is not None else ""

    @property
    def known(self) -> list[Known]:
        """Peers and seeds, but for those that are this node itself."""
        peers = [Known(each.address, each.key, each.name) for each in self.peers]
        seeds = [Known(each.address, each.key) for each in self.seeds]
        return [each for each in peers + seeds if not self._is_own(each)]

    @property
    def own_entries(self) -> list[str]:
        """Settings that speak of this node itself, as where all nodes have one file. They are left out."""
        return [
            setting
            for setting, each in self._entries()
            if self._is_own(Known(each.address, each.key, getattr(each, "name", "")))
        ]

    @property
    def allowed(self) -> frozenset[str]:
        """Public keys that may connect and be connected to. Empty where nothing is encrypted."""
        if self.key is None:
            return frozenset()
        keys = {*self.allow, self.own_key, *(each.key for _, each in self._entries())}
        return frozenset(keys | ({self.dns.key} if self.dns is not None else set()))

    def advertised(self, bound: Sequence[str] = ()) -> str:
        """The address that others are told; empty: this node only reads.

        Args:
            bound: what `listen` became, where the system chose a port; else `listen` itself.

        Raises:
            ConfigError: none is given, and none can be found.
        """
        if self.advertise is not None:
            return self.advertise
        addresses = [parse(text) for text in bound or self.listen]
        if not addresses:
            return ""
        first = next((each for each in addresses if isinstance(each, TcpAddress)), addresses[0])
        if isinstance(first, IpcAddress):
            return str(first)
        if first.port == 0:
            raise ConfigError(
                "advertise", f"{first}: the port is not known before it is listened to"
            )
        return str(self._seen_from_elsewhere(first) if first.is_wildcard else first)

    def _seen_from_elsewhere(self, wildcard: TcpAddress) -> TcpAddress:
        families = (socket.AF_INET,) if "." in wildcard.host else (socket.AF_INET, socket.AF_INET6)
        try:
            return TcpAddress(outward_host(families), wildcard.port)
        except OSError as error:
            raise ConfigError(
                "advertise",
                f"no address for {wildcard} was found ({error}); give the one that others reach",
            ) from error

    def following(self, old: PeerSettings) -> tuple[PeerSettings, tuple[str, ...]]:
        """These in a node that began with others, and the settings that wait for a restart.

        Raises:
            ConfigError: these do not go with what stays as it was.
        """
        waiting = tuple(each for each in RESTART if _value(self, each) != _value(old, each))
        following = self
        for setting in waiting:
            following = _replaced(following, setting.split("."), _value(old, setting))
        try:
            following.require_usable()
        except ConfigError as error:
            needs = f"{', '.join(waiting)} take a restart, and until then: {error.problem}"
            raise ConfigError(error.setting, needs) from error
        return following, waiting

    def require_usable(self) -> None:
        """Rules that look at several settings. Raises: ConfigError."""
        self._require_separate()
        self._require_room()
        if self.is_encrypted:
            self._require_keys()
        else:
            self._require_no_keys()
        if self.advertise is not None and not self.listen:
            raise ConfigError("advertise", "`listen` is empty: nobody is answered; take one out")
        if self.limits.silence <= 2 * self.limits.ping:
            raise ConfigError(
                "limits.silence",
                f"{self.limits.silence:g} seconds are no more than two pings (limits.ping: "
                f"{self.limits.ping:g}); one that is lost would cost the peer. Give it 3 x ping",
            )
        if ALL in self.share.namespaces and len(self.share.namespaces) > 1:
            raise ConfigError("share.namespaces", f'"{ALL}" is all of them; give it alone')

    def _require_separate(self) -> None:
        names: dict[str, str] = {}
        for number, peer in enumerate(self.peers):
            setting = f"peers[{number}].name"
            if peer.name in names:
                raise ConfigError(setting, f"{peer.name!r} is {names[peer.name]}, too; rename one")
            if peer.name == self.name and peer.key != self.own_key:
                raise ConfigError(setting, f"{peer.name!r} is this node's own name; rename one")
            names[peer.name] = setting
        if len(set(self.listen)) < len(self.listen):
            raise ConfigError(
                "listen", f"{', '.join(self.listen)}: one is there twice; take it out"
            )
        addresses: dict[str, str] = {}
        for setting, entry in self._entries():
            if entry.address in addresses:
                raise ConfigError(
                    f"{setting}.address",
                    f"{entry.address} is that of {addresses[entry.address]}, too; take one out",
                )
            addresses[entry.address] = setting

    def _require_room(self) -> None:
        count = len(self.known)
        if count > NODES_MOST:
            raise ConfigError("peers", f"{count} with the seeds; the most is {NODES_MOST}")
        if count > self.limits.peers:
            raise ConfigError(
                "limits.peers", f"{self.limits.peers}, but {count} peers and seeds are listed"
            )

    def _require_keys(self) -> None:
        """This node has a key: so must all that it connects to."""
        named = [*self._entries(), *([("dns", self.dns)] if self.dns is not None else [])]
        for setting, entry in named:
            if not entry.key:
                raise ConfigError(
                    f"{setting}.key",
                    "it is missing; give that node's public key, as this node has a key itself",
                )

    def _require_no_keys(self) -> None:
        """This node has none: nothing may say that it were encrypted, nor leave the machine unasked."""
        keyed = [setting for setting, entry in self._entries() if entry.key]
        if self.dns is not None and self.dns.key:
            keyed.append("dns")
        if keyed or self.allow:
            what = f"{keyed[0]}.key" if keyed else "allow"
            raise ConfigError(
                "key", f"{what} is given, and this node has no key itself; give its secret key file"
            )
        for setting, where in [] if self.insecure else self._outward():
            raise ConfigError(
                "key",
                f"{setting} ({where}) is plain TCP beyond this machine; make a key with `lmcache-sglang "
                "keygen` and give its path, or say `insecure: true`",
            )

    def _outward(self) -> Iterator[tuple[str, Address | str]]:
        """Settings that lead beyond this machine."""
        written = [("listen", text) for text in self.listen]
        written += [(f"{setting}.address", entry.address) for setting, entry in self._entries()]
        for setting, text in written:
            if not (address := parse(text)).is_local:
                yield setting, address
        if self.dns is not None:
            yield "dns.name", self.dns.name

    def _entries(self) -> Iterator[tuple[str, PeerNode | Seed]]:
        for number, peer in enumerate(self.peers):
            yield f"peers[{number}]", peer
        for number, seed in enumerate(self.seeds):
            yield f"seeds[{number}]", seed

    def _is_own(self, known: Known) -> bool:
        """By key; by name where there are none."""
        return known.key == self.own_key if self.is_encrypted else known.node == self.name


def _value(settings: PeerSettings, setting: str) -> object:
    return reduce(getattr, setting.split("."), settings)


def _replaced(model: Model, where: list[str], value: object) -> Model:
    if where[1:]:
        value = _replaced(getattr(model, where[0]), where[1:], value)
    return model.model_copy(update={where[0]: value})
