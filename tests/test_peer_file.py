"""The peer-sharing file on a disk: read at start, and again when it, or a key file, changes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lmcache_sglang.errors import ConfigError
from lmcache_sglang.peer_file import Changed, PeerFile, Refused, Unchanged
from lmcache_sglang.storage.peers.keys import KeyFiles, KeyPair
from lmcache_sglang.storage.peers.settings import PeerSettings

OWN, OTHER, THIRD = (KeyPair.new() for _ in range(3))
TEXT = """
name: here
key: keys/own.key_secret
peers: [{name: other, address: "tcp://other:1", key: keys/other.key}]
allow: [friends]
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The file, with its keys beside it."""
    for name, pair in {"own": OWN, "other": OTHER}.items():
        KeyFiles.of(tmp_path / "keys", name).write(pair)
    KeyFiles.of(tmp_path / "friends", "other").write(OTHER)
    path = tmp_path / "peers.yaml"
    path.write_text(TEXT)
    return path


@pytest.fixture
def file(path: Path) -> PeerFile:
    """Loaded."""
    file = PeerFile(path)
    file.load()
    return file


def change(file: PeerFile) -> Changed:
    assert isinstance(file.changed(), Unchanged)  # it may still be written
    outcome = file.changed()
    assert isinstance(outcome, Changed)
    assert outcome.settings == file.settings
    assert isinstance(file.changed(), Unchanged)  # told once
    return outcome


def refusal(file: PeerFile) -> ConfigError:
    before = file.settings
    assert isinstance(file.changed(), Unchanged)  # it may still be written
    outcome = file.changed()
    assert isinstance(outcome, Refused)
    assert file.settings == before
    assert isinstance(file.changed(), Unchanged)  # told once
    return outcome.error


def allowed(settings: PeerSettings) -> set[str]:
    return set(settings.allowed)


# --- at start ---


def test_paths_in_it_begin_in_its_folder(
    path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    settings = PeerFile(path).load()
    assert settings.key == OWN
    assert allowed(settings) == {OWN.public, OTHER.public}


@pytest.mark.parametrize("name", ["peers.json", "peers.toml"])
def test_it_may_be_json_or_toml(path: Path, name: str) -> None:
    texts = {
        "peers.json": json.dumps({"name": "x", "key": "keys/own.key_secret"}),
        "peers.toml": 'name = "x"\nkey = "keys/own.key_secret"',
    }
    other = path.with_name(name)
    other.write_text(texts[name])
    assert PeerFile(other).load().name == "x"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot read"),
        ("listen: *", "does not parse"),
        ("- a", "a mapping"),
        ("limit: {}", "limit: there is no such key; did you mean limits?"),
        ("", "key: listen"),
        ("key: gone.key_secret", "key: there is no"),
    ],
)
def test_what_cannot_be_used_names_the_file(path: Path, text: str | None, says: str) -> None:
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        PeerFile(path).load()
    assert caught.value.setting.startswith("peers")
    assert str(path) in str(caught.value)
    assert says in str(caught.value)


def test_nothing_is_in_force_before_it_is_loaded(path: Path) -> None:
    with pytest.raises(RuntimeError, match="load"):
        PeerFile(path).changed()


# --- when it changes ---


def test_a_file_that_did_not_change_is_not_read(
    file: PeerFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PeerFile, "_read", lambda self: pytest.fail("it was read"))
    assert isinstance(file.changed(), Unchanged)


def test_a_change_is_told_once_and_in_force(file: PeerFile) -> None:
    file.path.write_text(TEXT + "keep: never\n")
    outcome = change(file)
    assert outcome.settings.keep == "never"
    assert outcome.restart == ()


def test_the_same_settings_in_other_words_are_no_change(file: PeerFile) -> None:
    file.path.write_text("# a comment\n" + TEXT)
    assert isinstance(file.changed(), Unchanged)


def test_a_change_of_the_same_length_and_time_is_seen(file: PeerFile) -> None:
    """Some editors put the old times on the new file."""
    before = file.path.stat()
    other = file.path.with_name("new")
    other.write_text(TEXT.replace("tcp://other:1", "tcp://other:2"))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file.path)
    assert file.path.stat().st_mtime_ns == before.st_mtime_ns
    assert change(file).settings.peers[0].address == "tcp://other:2"


def test_what_takes_a_restart_waits_for_it(file: PeerFile) -> None:
    file.path.write_text(TEXT.replace("here", "there") + "keep: never\n")
    outcome = change(file)
    assert outcome.restart == ("name",)
    assert (outcome.settings.name, outcome.settings.keep) == ("here", "never")
    assert PeerFile(file.path).load().name == "there"


def test_another_key_of_a_peer_is_a_change(file: PeerFile) -> None:
    KeyFiles.of(file.path.parent / "keys", "other").write(THIRD, force=True)
    assert change(file).settings.peers[0].key == THIRD.public


def test_another_key_of_this_node_waits_for_a_restart(file: PeerFile) -> None:
    KeyFiles.of(file.path.parent / "keys", "own").write(THIRD, force=True)
    outcome = change(file)
    assert outcome.restart == ("key",)
    assert outcome.settings.key == OWN


def test_a_friend_comes_and_goes(file: PeerFile) -> None:
    friends = file.path.parent / "friends"
    KeyFiles.of(friends, "third").write(THIRD)
    assert allowed(change(file).settings) == {OWN.public, OTHER.public, THIRD.public}
    (friends / "third.key").unlink()
    assert allowed(change(file).settings) == {OWN.public, OTHER.public}


def test_a_kubernetes_config_map_is_followed_through_its_link(path: Path) -> None:
    """..data is a link to a folder of one version; an update makes it a link to another one."""
    folder = path.parent / "mounted"
    for version, keep in (("1", "always"), ("2", "never")):
        (folder / f"..{version}").mkdir(parents=True)
        (folder / f"..{version}" / "peers.yaml").write_text(
            f"listen: tcp://127.0.0.1:1\nkeep: {keep}\n"
        )
    (folder / "..data").symlink_to("..1")
    (folder / "peers.yaml").symlink_to("..data/peers.yaml")
    file = PeerFile(folder / "peers.yaml")
    assert file.load().keep == "always"
    (folder / "..data_tmp").symlink_to("..2")
    (folder / "..data_tmp").replace(folder / "..data")
    assert change(file).settings.keep == "never"


# --- when it changes for the worse ---


@pytest.mark.parametrize("text", ["limit: {}", "key: [", "", TEXT + "limits: {silence: 1}"])
def test_a_file_that_cannot_be_used_changes_nothing(file: PeerFile, text: str) -> None:
    file.path.write_text(text)
    assert str(file.path) in str(refusal(file))


def test_what_is_mended_counts_again(file: PeerFile) -> None:
    file.path.write_text("limit: {}")
    refusal(file)
    file.path.write_text(TEXT)
    assert isinstance(file.changed(), Unchanged)  # it says what is in force
    file.path.write_text("limit: {}")
    refusal(file)
    file.path.write_text(TEXT + "keep: never\n")
    assert change(file).settings.keep == "never"


def test_a_file_that_is_away_is_read_when_it_is_back(file: PeerFile) -> None:
    file.path.unlink()
    assert "cannot read" in str(refusal(file))
    file.path.write_text(TEXT + "keep: never\n")
    assert change(file).settings.keep == "never"


def test_a_key_file_that_was_wrong_is_watched_too(file: PeerFile) -> None:
    """The settings file does not change when it is mended."""
    key = file.path.parent / "keys" / "new.key"
    file.path.write_text(TEXT.replace("keys/other.key", "keys/new.key"))
    assert "keys/new.key" in str(refusal(file))
    KeyFiles.of(key.parent, "new").write(THIRD)
    assert change(file).settings.peers[0].key == THIRD.public


def test_a_secret_that_becomes_readable_is_refused_until_it_is_not(file: PeerFile) -> None:
    secret = file.path.parent / "keys" / "own.key_secret"
    secret.chmod(0o644)
    assert "chmod 600" in str(refusal(file))
    secret.chmod(0o600)
    assert isinstance(file.changed(), Unchanged)
    assert file.settings.key == OWN


def test_what_does_not_go_with_what_waits_is_refused(path: Path) -> None:
    path.write_text("name: here\nlisten: tcp://127.0.0.1:1\n")
    file = PeerFile(path)
    file.load()
    path.write_text(TEXT)
    assert "restart" in str(refusal(file))


def test_a_file_that_is_written_in_pieces_is_taken_when_it_is_whole(
    file: PeerFile, path: Path
) -> None:
    text = path.read_text() + "keep: never\n"
    for end in range(0, len(text), 40):
        path.write_text(text[:end])
        assert isinstance(file.changed(), Unchanged)
    path.write_text(text)
    assert change(file).settings.keep == "never"
