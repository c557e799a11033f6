"""The peer-sharing settings: what they become, what a mistake is told, and what the manual says of them."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lmcache_sglang.errors import ConfigError
from lmcache_sglang.sections import keys_of
from lmcache_sglang.storage.peers import addresses
from lmcache_sglang.storage.peers.addresses import ELSEWHERE, outward_host, parse
from lmcache_sglang.storage.peers.advice import advice
from lmcache_sglang.storage.peers.keys import KeyFiles, KeyPair, KeyReader
from lmcache_sglang.storage.peers.membership import Known
from lmcache_sglang.storage.peers.settings import RESTART, PeerSettings

MANUAL = (Path(__file__).parents[3] / "docs" / "peers.md").read_text()
LOCAL = {"name": "here", "listen": "tcp://127.0.0.1:7801"}
OWN, OTHER, THIRD = (KeyPair.new() for _ in range(3))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the keys of three nodes."""
    for name, pair in {"own": OWN, "other": OTHER, "third": THIRD}.items():
        KeyFiles.of(tmp_path, name).write(pair)
    return tmp_path


def read(settings: Mapping[str, Any], folder: Path = Path()) -> PeerSettings:
    return PeerSettings.of(settings, KeyReader(folder))


def refusal(settings: Mapping[str, Any], folder: Path = Path()) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        read(LOCAL | dict(settings), folder)
    return caught.value


def peer(name: str, address: str = "", **more: object) -> dict[str, object]:
    return {"name": name, "address": address or f"tcp://localhost:{7900 + len(name)}"} | more


# --- what the manual says ---


def test_the_manual_has_each_setting_once_in_the_order_of_the_model() -> None:
    assert re.findall(r"^\| `([a-z_\[\].]+)` \|", MANUAL, re.MULTILINE) == keys_of(PeerSettings)


def test_the_manual_says_what_takes_a_restart() -> None:
    (said,) = re.findall(r"without a restart but these:\n(.*) stay as they were", MANUAL)
    assert tuple(re.findall(r"`(.*?)`", said)) == RESTART


def test_the_manuals_example_is_one(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", MANUAL, re.DOTALL)
    for name in ("node-a", "node-b"):
        KeyFiles.of(tmp_path / "keys", name).write(KeyPair.new())
    settings = read(yaml.safe_load(example), tmp_path)
    assert [each.node for each in settings.known] == ["node-b", "node-c"]
    assert settings.limits.bandwidth == 2 << 30


def test_each_setting_is_described_in_the_model() -> None:
    assert all(field.description for field in PeerSettings.model_fields.values())
    for section in (PeerSettings.model_fields["limits"], PeerSettings.model_fields["share"]):
        assert isinstance(section.annotation, type)
        fields = section.annotation.model_fields
        assert all(field.description for field in fields.values())


# --- what they become ---


def test_defaults() -> None:
    settings = read({"insecure": True})
    assert settings.name == re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:64]
    assert settings.listen == ("tcp://0.0.0.0:7801",)
    assert not settings.is_encrypted
    assert settings.known == []
    assert settings.limits.in_flight == 64 << 20
    assert settings.limits.window == 16 << 20
    assert settings.limits.directory == 1 << 30
    assert settings.share.enabled
    assert settings.keep == "always"


def test_keys_are_read_from_where_the_file_says(folder: Path) -> None:
    settings = read(
        {
            "key": "own.key_secret",
            "peers": [peer("other", key="other.key")],
            "seeds": [{"address": "tcp://seed:1", "key": THIRD.public}],
        },
        folder,
    )
    assert settings.key == OWN
    assert settings.known == [
        Known("tcp://localhost:7905", OTHER.public, "other"),
        Known("tcp://seed:1", THIRD.public),
    ]
    assert settings.allowed == {OWN.public, OTHER.public, THIRD.public}


@pytest.mark.parametrize("allow", [["other.key"], "other.key", [OTHER.public], ["keys"]])
def test_who_may_connect_is_a_key_a_file_or_a_folder(folder: Path, allow: object) -> None:
    KeyFiles.of(folder / "keys", "x").write(OTHER)
    settings = read({"key": "own.key_secret", "allow": allow}, folder)
    assert settings.allowed == {OWN.public, OTHER.public}


def test_names_have_a_key_of_their_own(folder: Path) -> None:
    dns = {"name": "peers.svc", "key": OTHER.public}
    settings = read({"key": "own.key_secret", "dns": dns}, folder)
    assert settings.allowed == {OWN.public, OTHER.public}
    assert settings.dns is not None
    assert (settings.dns.port, settings.dns.every) == (7801, 30.0)


def test_nobody_is_asked_for_a_key_where_nothing_is_encrypted() -> None:
    assert read(LOCAL).allowed == frozenset()


def test_an_entry_of_this_node_itself_is_left_out(folder: Path) -> None:
    everybody = [peer("here", key="own.key"), peer("other", key="other.key")]
    settings = read({"name": "here", "key": "own.key_secret", "peers": everybody}, folder)
    assert [each.node for each in settings.known] == ["other"]
    assert settings.own_entries == ["peers[0]"]
    assert any(line.startswith("peers[0]:") for line in advice(settings))
    plain = read(LOCAL | {"peers": [peer("here"), peer("other")]})
    assert [each.node for each in plain.known] == ["other"]


@pytest.mark.parametrize("given", [False, {"enabled": False}])
def test_sharing_is_a_switch_or_a_section(given: object) -> None:
    assert not read(LOCAL | {"share": given}).share.enabled
    assert read(LOCAL | {"share": {"models": "meta-*"}}).share.models == ("meta-*",)


def test_namespaces_are_written_alike() -> None:
    share = read(LOCAL | {"share": {"namespaces": "AB" * 16}}).share
    assert share.namespaces == ("ab" * 16,)


# --- addresses ---


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("tcp://Node-B.Example:1", "tcp://node-b.example:1"),
        ("tcp://[0:0::1]:65535", "tcp://[::1]:65535"),
        ("tcp://10.0.0.1:7801", "tcp://10.0.0.1:7801"),
        ("ipc:///run/a b", "ipc:///run/a b"),
        ("tcp://my_svc.ns:1", "tcp://my_svc.ns:1"),
    ],
)
def test_addresses_are_written_alike(written: str, meant: str) -> None:
    assert str(parse(written)) == meant == str(parse(meant))


@pytest.mark.parametrize(
    "address",
    [
        "",
        "node-b:7801",
        "udp://node-b:7801",
        "tcp://node-b",
        "tcp://node-b:",
        "tcp://node-b:0",
        "tcp://node-b:65536",
        "tcp://node-b:7801/x",
        "tcp://:7801",
        "tcp://*:7801",
        "tcp://0.0.0.0:7801",
        "tcp://[::]:7801",
        "tcp://::1:7801",
        "tcp://[10.0.0.1]:7801",
        "tcp://10.0.0.256:7801",
        "tcp://a..b:1",
        "tcp://-a:1",
        "tcp://a b:1",
        "tcp://[::ffff:0.0.0.0]:1",
        "tcp://node-b:\u0661",
        "ipc://relative",
        "ipc://@abstract",
        "ipc:///" + "x" * 107,
        "ipc:///a\0b",
        "tcp://" + "a." * 200 + "b:1",
        5,
        None,
    ],
)
def test_an_address_that_leads_nowhere_is_refused(address: object) -> None:
    error = refusal({"insecure": True, "peers": [{"name": "b", "address": address}]})
    assert error.setting == "peers[0].address"


@given(st.text(max_size=40))
def test_no_text_is_more_than_a_wrong_address(text: str) -> None:
    for written in (text, f"tcp://{text}", f"tcp://{text}:1", f"ipc:///{text}"):
        try:
            address = parse(written)
        except ValueError:
            continue
        assert parse(str(address)) == address


@pytest.mark.parametrize("host", ["node-b", "localhost", "*", "eth0"])
def test_what_is_listened_to_is_an_ip_address(host: str) -> None:
    assert refusal({"listen": [f"tcp://{host}:7801"]}).setting == "listen[0]"


# --- what others are told ---


@pytest.mark.parametrize(
    ("listen", "told"),
    [
        ([], ""),
        ("ipc:///run/peers", "ipc:///run/peers"),
        (["ipc:///run/peers", "tcp://10.0.0.7:1"], "tcp://10.0.0.7:1"),
        (["tcp://10.0.0.7:1", "tcp://0.0.0.0:2"], "tcp://10.0.0.7:1"),
        ("tcp://[fd00::7]:1", "tcp://[fd00::7]:1"),
        ("tcp://0.0.0.0:7", "tcp://198.51.100.9:7"),
        ("tcp://[::]:7", "tcp://198.51.100.9:7"),
    ],
)
def test_others_are_told_the_first_address_that_leads_here(
    listen: object, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(addresses, "_at_default_route", lambda family: "198.51.100.9")
    assert read({"insecure": True, "listen": listen}).advertised() == told


def test_a_given_address_is_told_as_it_is() -> None:
    assert read(LOCAL | {"advertise": "tcp://node-a:9"}).advertised() == "tcp://node-a:9"


def test_a_port_that_the_system_chooses_is_told_once_it_is_known() -> None:
    settings = read({"listen": "tcp://127.0.0.1:0"})
    assert settings.advertised(["tcp://127.0.0.1:5123"]) == "tcp://127.0.0.1:5123"
    with pytest.raises(ConfigError, match=r"^advertise: .*port"):
        settings.advertised()


def test_a_machine_without_a_route_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_at_default_route", lambda family: "")
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 0, "", (ip, 0)) for ip in ("127.0.1.1", "192.0.2.5")
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert outward_host() == "192.0.2.5"
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found[:1])
    with pytest.raises(ConfigError, match=r"^advertise: .*give the one that others reach"):
        read({"insecure": True}).advertised()


def test_the_default_route_is_asked_without_a_packet() -> None:
    """What it finds, it can bind; without a route it finds nothing."""
    for family in ELSEWHERE:
        host = addresses._at_default_route(family)
        if host:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.bind((host, 0))


# --- mistakes ---


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"name": ""}, "name"),
        ({"name": "a b"}, "name"),
        ({"name": "a\n"}, "name"),
        ({"name": "x" * 65}, "name"),
        ({"name": 5}, "name"),
        ({"listen": 5}, "listen"),
        ({"listen": "7801"}, "listen[0]"),
        ({"listen": ["tcp://127.0.0.1:1", "tcp://127.0.0.1:1"]}, "listen"),
        ({"listen": [], "advertise": "tcp://a:1"}, "advertise"),
        ({"advertise": "tcp://0.0.0.0:1"}, "advertise"),
        ({"key": 5}, "key"),
        ({"key": "gone.key_secret"}, "key"),
        ({"insecure": "yes"}, "insecure"),
        ({"insecure": 1}, "insecure"),
        ({"peers": {"name": "b"}}, "peers"),
        ({"peers": ["b"]}, "peers[0]"),
        ({"peers": [{"address": "tcp://localhost:1"}]}, "peers[0].name"),
        ({"seeds": [{"name": "b", "address": "tcp://localhost:1"}]}, "seeds[0].name"),
        ({"dns": {"name": ""}}, "dns.name"),
        ({"dns": {"name": "a", "port": 0}}, "dns.port"),
        ({"dns": {"name": "a", "every": 0}}, "dns.every"),
        ({"allow": 5}, "allow"),
        ({"allow": [5]}, "allow"),
        ({"allow": ["gone"]}, "allow"),
        ({"limits": 5}, "limits"),
        ({"limits": {"bandwidth": -1}}, "limits.bandwidth"),
        ({"limits": {"bandwidth": True}}, "limits.bandwidth"),
        ({"limits": {"bandwidth": float("nan")}}, "limits.bandwidth"),
        ({"limits": {"bandwidth": "5%"}}, "limits.bandwidth"),
        ({"limits": {"in_flight": "1KiB"}}, "limits.in_flight"),
        ({"limits": {"in_flight": "auto"}}, "limits.in_flight"),
        ({"limits": {"window": "9" * 400 + "GiB"}}, "limits.window"),
        ({"limits": {"requests": True}}, "limits.requests"),
        ({"limits": {"requests": 0}}, "limits.requests"),
        ({"limits": {"streams": 17}}, "limits.streams"),
        ({"limits": {"streams": 2.0}}, "limits.streams"),
        ({"limits": {"deadline": float("nan")}}, "limits.deadline"),
        ({"limits": {"deadline": float("inf")}}, "limits.deadline"),
        ({"limits": {"deadline": -1}}, "limits.deadline"),
        ({"limits": {"deadline": 600}}, "limits.deadline"),
        ({"limits": {"ping": True}}, "limits.ping"),
        ({"limits": {"ping": "2"}}, "limits.ping"),
        ({"limits": {"ping": 3}}, "limits.silence"),
        ({"limits": {"silence": 4}}, "limits.silence"),
        ({"limits": {"peers": 65}}, "limits.peers"),
        ({"share": {"models": [""]}}, "share.models[0]"),
        ({"share": {"namespaces": ["abc"]}}, "share.namespaces[0]"),
        ({"share": {"namespaces": ["*", "ab" * 16]}}, "share.namespaces"),
        ({"share": {"minimum_prefix": -1}}, "share.minimum_prefix"),
        ({"share": "no"}, "share"),
        ({"keep": "sometimes"}, "keep"),
    ],
    ids=str,
)
def test_a_mistake_names_its_key(settings: dict[str, Any], key: str, tmp_path: Path) -> None:
    error = refusal(settings, tmp_path)
    assert error.setting == key
    assert "PeerNode" not in str(error)  # our class names are not the user's words


@pytest.mark.parametrize(
    ("settings", "key", "near"),
    [
        ({"peer": []}, "peer", "peers"),
        ({"limits": {"bandwith": 1}}, "limits.bandwith", "limits.bandwidth"),
        ({"peers": [{"name": "b", "adress": "x"}]}, "peers[0].adress", "peers[].address"),
        ({"dns": {"nmae": "b"}}, "dns.nmae", "dns.name"),
        ({"zzz": 1}, "zzz", "valid keys: name, listen"),
    ],
)
def test_an_unknown_key_is_told_the_nearest(settings: dict[str, Any], key: str, near: str) -> None:
    error = refusal(settings)
    assert error.setting == key
    assert near in error.problem


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"listen": "tcp://0.0.0.0:7801"}, "listen"),
        ({"listen": ["tcp://127.0.0.1:1", "tcp://10.0.0.7:7801"]}, "listen"),
        ({"peers": [peer("b", "tcp://node-b:1")]}, "peers[0].address"),
        ({"seeds": [{"address": "tcp://10.0.0.1:1"}]}, "seeds[0].address"),
        ({"dns": {"name": "peers.svc"}}, "dns.name"),
    ],
)
def test_nothing_leaves_the_machine_in_clear_unasked(
    settings: dict[str, Any], named: str, folder: Path
) -> None:
    error = refusal(settings, folder)
    assert error.setting == "key"
    assert error.problem.startswith(named)
    assert "keygen" in error.problem
    assert "insecure: true" in error.problem
    assert not read(LOCAL | settings | {"insecure": True}).is_encrypted


@pytest.mark.parametrize(
    "address", ["tcp://127.9.9.9:1", "tcp://[::1]:1", "tcp://localhost:1", "ipc:///run/x"]
)
def test_what_stays_on_the_machine_needs_no_key(address: str) -> None:
    assert len(read(LOCAL | {"peers": [peer("b", address)]}).known) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"peers": [peer("b", "ipc:///run/b")]},
        {"seeds": [{"address": "tcp://127.0.0.1:1"}]},
        {"dns": {"name": "peers.svc"}},
    ],
)
def test_a_node_with_a_key_talks_to_none_without(settings: dict[str, Any], folder: Path) -> None:
    error = refusal(settings | {"key": "own.key_secret"}, folder)
    assert error.setting.endswith(".key")
    assert "missing" in error.problem


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"peers": [peer("b", key="other.key")]}, "peers[0].key"),
        ({"dns": {"name": "peers.svc", "key": "other.key"}}, "dns.key"),
        ({"allow": ["other.key"]}, "allow"),
    ],
)
def test_keys_of_others_say_that_encryption_was_meant(
    settings: dict[str, Any], named: str, folder: Path
) -> None:
    for insecure in (False, True):
        error = refusal(settings | {"insecure": insecure}, folder)
        assert error.setting == "key"
        assert error.problem.startswith(named)


def test_a_secret_that_others_may_read_is_refused(folder: Path) -> None:
    (folder / "own.key_secret").chmod(0o644)
    error = refusal({"key": "own.key_secret"}, folder)
    assert (error.setting, "chmod 600" in error.problem) == ("key", True)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (
            {"peers": [peer("b", "tcp://localhost:1"), peer("b", "tcp://localhost:2")]},
            "peers[1].name",
        ),
        (
            {"peers": [peer("b", "tcp://localhost:1"), peer("c", "tcp://LOCALHOST:1")]},
            "peers[1].address",
        ),
        (
            {
                "peers": [peer("b", "tcp://localhost:1")],
                "seeds": [{"address": "tcp://localhost:1"}],
            },
            "seeds[0].address",
        ),
    ],
)
def test_nobody_is_there_twice(settings: dict[str, Any], key: str) -> None:
    assert refusal(settings).setting == key


def test_another_node_does_not_have_this_ones_name(folder: Path) -> None:
    settings = {"key": "own.key_secret", "peers": [peer("here", key="other.key")]}
    assert refusal(settings, folder).setting == "peers[0].name"


def test_there_are_64_peers_at_most_beside_the_node_itself() -> None:
    crowd = [peer(f"n{n}", f"tcp://localhost:{1000 + n}") for n in range(64)]
    itself = peer("here", "tcp://localhost:9999")
    assert len(read(LOCAL | {"peers": [itself, *crowd]}).known) == 64
    one_more = [*crowd, peer("x", "tcp://localhost:9998")]
    assert refusal({"peers": one_more}).setting == "peers"
    assert refusal({"peers": crowd, "limits": {"peers": 63}}).setting == "limits.peers"


# --- advice ---


@pytest.mark.parametrize(
    ("settings", "about"),
    [
        (LOCAL, "peers"),
        ({"listen": []}, "listen"),
        ({"listen": [], "peers": [peer("b")]}, "listen"),
        (LOCAL | {"share": False}, "share"),
        (LOCAL | {"insecure": True}, "insecure"),
        ({"key": "own.key_secret", "insecure": True}, "insecure"),
        ({"key": "own.key_secret"}, "allow"),
        ({"key": "own.key_secret", "dns": {"name": "a", "key": "other.key"}}, "dns.key"),
        (LOCAL | {"limits": {"streams": 3}}, "limits.streams"),
        (LOCAL | {"limits": {"window": "1GiB"}}, "limits.window"),
        (LOCAL | {"limits": {"deadline": 0.01}}, "limits.deadline"),
        (LOCAL | {"limits": {"bandwidth": "1MiB"}}, "limits.bandwidth"),
        ({"insecure": True, "advertise": "tcp://127.0.0.1:1"}, "advertise"),
    ],
    ids=str,
)
def test_what_is_probably_not_meant_is_said(
    settings: dict[str, Any], about: str, folder: Path
) -> None:
    assert about in [line.split(":")[0] for line in advice(read(settings, folder))]


def test_there_is_nothing_to_say_of_two_nodes_that_know_each_other(folder: Path) -> None:
    settings = {"key": "own.key_secret", "peers": [peer("other", key="other.key")]}
    assert advice(read(settings, folder)) == []


# --- a running node ---

OLD: dict[str, Any] = {
    "name": "here",
    "key": "own.key_secret",
    "listen": "tcp://10.0.0.1:1",
    "peers": [peer("other", key=OTHER.public)],
}
OTHERWISE: dict[str, Any] = {
    "name": "there",
    "listen": "tcp://10.0.0.1:2",
    "advertise": "tcp://node:2",
    "key": "third.key_secret",
    "insecure": True,
    "peers": [],
    "seeds": [{"address": "tcp://seed:1", "key": THIRD.public}],
    "dns": {"name": "peers.svc", "key": THIRD.public},
    "allow": [THIRD.public],
    "share": False,
    "keep": "never",
}
LIMITS: dict[str, Any] = {
    "bandwidth": 1 << 30,
    "in_flight": 1 << 30,
    "window": 1 << 20,
    "requests": 3,
    "streams": 3,
    "deadline": 3.0,
    "ping": 1.0,
    "silence": 7.0,
    "directory": 4 << 20,
    "peers": 3,
}
CHANGES = [({key: value}, key) for key, value in OTHERWISE.items()] + [
    ({"limits": {key: value}}, f"limits.{key}") for key, value in LIMITS.items()
]


def test_the_changes_below_are_all_there_are() -> None:
    every = {key for key in keys_of(PeerSettings) if "." not in key or key.startswith("limits.")}
    assert {setting for _, setting in CHANGES} == every - {"limits"}


@pytest.mark.parametrize(("change", "setting"), CHANGES, ids=lambda each: str(each)[:40])
def test_a_change_is_live_or_waits_for_a_restart(
    change: dict[str, Any], setting: str, folder: Path
) -> None:
    old, new = read(OLD, folder), read(OLD | change, folder)
    assert new != old
    following, waiting = new.following(old)
    if setting in RESTART:
        assert waiting == (setting,)
        assert following == old
    else:
        assert waiting == ()
        assert following == new


def test_what_is_live_is_taken_over_beside_what_waits(folder: Path) -> None:
    limits = {"directory": "2GiB", "deadline": 1}
    new = read(OLD | {"name": "there", "keep": "never", "limits": limits}, folder)
    following, waiting = new.following(read(OLD, folder))
    assert waiting == ("name", "limits.directory")
    assert (following.name, following.keep) == ("here", "never")
    assert (following.limits.directory, following.limits.deadline) == (1 << 30, 1.0)


def test_what_does_not_go_with_the_old_rest_is_refused(folder: Path) -> None:
    """A key that comes with a restart, and a peer that is only reached with it."""
    with pytest.raises(ConfigError, match=r"^key: listen, key") as caught:
        read(OLD, folder).following(read(LOCAL))
    assert "restart" in caught.value.problem
