"""Keys in files: who may read them, and what is told about one that cannot be used."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import zmq
import zmq.auth
from hypothesis import given
from hypothesis import strategies as st
from zmq.utils import z85

from lmcache_sglang.errors import ConfigError
from lmcache_sglang.storage.peers.keys import (
    KEY_CHARACTERS,
    KeyFiles,
    KeyPair,
    KeyReader,
    fingerprint,
    is_key,
    public_key,
)


@pytest.fixture
def files(tmp_path: Path) -> KeyFiles:
    return KeyFiles.of(tmp_path / "keys", "node-a")


@pytest.fixture
def pair(files: KeyFiles) -> KeyPair:
    """In those files."""
    pair = KeyPair.new()
    files.write(pair)
    return pair


def refusal(read: Callable[[], object]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        read()
    return caught.value


def test_pyzmq_reads_both_files(files: KeyFiles, pair: KeyPair) -> None:
    public, secret = pair.public.encode(), pair.secret.encode()
    assert zmq.auth.load_certificate(files.public) == (public, None)
    assert zmq.auth.load_certificate(files.secret) == (public, secret)


def test_we_read_pyzmqs_files(tmp_path: Path) -> None:
    public, secret = map(Path, zmq.auth.create_certificates(tmp_path, "node-a"))
    secret.chmod(0o600)
    read = KeyPair.load(secret)
    assert (read.public.encode(), read.secret.encode()) == zmq.auth.load_certificate(secret)
    assert public_key(str(public)) == read.public


def test_a_pair_comes_back_as_it_was_written(files: KeyFiles, pair: KeyPair) -> None:
    assert KeyPair.load(files.secret) == pair
    assert public_key(str(files.public)) == pair.public
    assert zmq.curve_public(pair.secret.encode()).decode() == pair.public


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_modes_do_not_depend_on_the_umask(files: KeyFiles, umask: int) -> None:
    before = os.umask(umask)
    try:
        files.write(KeyPair.new())
    finally:
        os.umask(before)
    assert stat.S_IMODE(files.secret.stat().st_mode) == 0o600
    assert stat.S_IMODE(files.public.stat().st_mode) == 0o644
    assert stat.S_IMODE(files.secret.parent.stat().st_mode) == 0o700


def test_no_file_is_ever_open_to_others_while_it_may_hold_the_secret(
    files: KeyFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(0)
    modes = []
    real = os.fsync

    def looking(descriptor: int) -> None:
        modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", looking)
    real_open, opened = os.open, []

    def opening(path: str, flags: int, mode: int = 0o777, **more: int) -> int:
        opened.append((flags & os.O_EXCL, mode & 0o077))
        return real_open(path, flags, mode, **more)

    monkeypatch.setattr(os, "open", opening)
    try:
        files.write(KeyPair.new())
    finally:
        os.umask(before)
    assert modes == [0o600, 0o644]
    assert len(opened) == 2
    assert all(exclusive and not others for exclusive, others in opened)


@pytest.mark.parametrize("there", ["public", "secret"])
def test_what_is_there_is_not_replaced_unless_asked(files: KeyFiles, there: str) -> None:
    files.secret.parent.mkdir()
    old: Path = getattr(files, there)
    old.write_text("precious")
    with pytest.raises(FileExistsError, match=old.name):
        files.write(KeyPair.new())
    assert [path.name for path in old.parent.iterdir()] == [old.name]
    assert old.read_text() == "precious"
    pair = KeyPair.new()
    files.write(pair, force=True)
    assert KeyPair.load(files.secret) == pair


def test_a_link_that_leads_nowhere_is_something_there(files: KeyFiles) -> None:
    files.secret.parent.mkdir()
    files.secret.symlink_to("/nowhere")
    with pytest.raises(FileExistsError):
        files.write(KeyPair.new())


def test_who_comes_first_in_a_race_wins(files: KeyFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """The public file appears after the look: nothing is replaced, and no half of a pair stays."""
    real = Path.hardlink_to

    def slower(path: Path, target: Path) -> None:
        if path == files.public:
            path.write_text("precious")
        real(path, target)

    monkeypatch.setattr(Path, "hardlink_to", slower)
    with pytest.raises(FileExistsError):
        files.write(KeyPair.new())
    assert files.public.read_text() == "precious"
    assert [path.name for path in files.public.parent.iterdir()] == [files.public.name]


def test_a_secret_is_in_no_log(pair: KeyPair) -> None:
    assert pair.secret not in repr(pair)
    assert pair.secret not in str(pair)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610, 0o644, 0o777])
def test_a_secret_that_others_may_read_is_refused(
    files: KeyFiles, pair: KeyPair, mode: int
) -> None:
    files.secret.chmod(mode)
    error = refusal(lambda: KeyPair.load(files.secret))
    assert error.setting == "key"
    assert "chmod 600" in error.problem
    assert f"{mode:04o}" in error.problem


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_secret_of_the_owner_alone_is_read(files: KeyFiles, pair: KeyPair, mode: int) -> None:
    files.secret.chmod(mode)
    assert KeyPair.load(files.secret) == pair


def test_a_public_file_is_no_secret_one(files: KeyFiles, pair: KeyPair) -> None:
    files.public.chmod(0o600)
    error = refusal(lambda: KeyPair.load(files.public, "mine"))
    assert error.setting == "mine"
    assert ".key_secret" in error.problem


def test_a_secret_file_is_no_public_one(files: KeyFiles, pair: KeyPair) -> None:
    error = refusal(lambda: public_key(str(files.secret)))
    assert "stays on its node" in error.problem
    assert pair.secret not in str(error)


def test_keys_that_are_no_pair_are_refused(files: KeyFiles, pair: KeyPair) -> None:
    other = KeyPair.new()
    files.write(KeyPair(other.public, pair.secret), force=True)
    assert "not a pair" in refusal(lambda: KeyPair.load(files.secret)).problem


@pytest.mark.parametrize("text", ["", "no certificate", 'curve\n  public-key = "short"\n', "\xff"])
def test_what_is_no_key_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.key"
    path.write_text(text, encoding="latin-1")
    path.chmod(0o600)
    assert "no secret key file" in refusal(lambda: KeyPair.load(path)).problem
    assert "no public key file" in refusal(lambda: public_key(str(path))).problem


def test_what_is_no_file_at_all_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.key", 0o600)
    for path in (tmp_path / "pipe.key", tmp_path):
        assert "is no file" in refusal(lambda path=path: KeyPair.load(path)).problem  # type: ignore[misc]
    gone = refusal(lambda: KeyPair.load(tmp_path / "gone"))
    assert "keygen" in gone.problem
    assert "keygen" in refusal(lambda: public_key("gone.key", tmp_path)).problem
    assert "no path" in refusal(lambda: KeyPair.load(tmp_path / "a\0b")).problem


@pytest.mark.parametrize(
    "text", ["", "x", "a\0b", "x" * 39, "x" * 41, "~" * 40, "#" * 40, "é" * 5000]
)
def test_what_is_neither_a_key_nor_a_file_is_refused(text: str, tmp_path: Path) -> None:
    if text:
        assert not is_key(text)
    assert refusal(lambda: public_key(text, tmp_path, "peers[0].key")).setting == "peers[0].key"


@given(st.binary(min_size=32, max_size=32))
def test_each_32_bytes_are_a_key(raw: bytes) -> None:
    assert is_key(z85.encode(raw).decode())


@given(st.text(alphabet=z85.Z85CHARS.decode(), min_size=40, max_size=40))
def test_what_is_taken_for_a_key_are_32_bytes(text: str) -> None:
    encoded = [text[at : at + 5].encode() for at in range(0, KEY_CHARACTERS, 5)]
    numbers = [sum(z85.Z85MAP[c] * 85 ** (4 - i) for i, c in enumerate(five)) for five in encoded]
    assert is_key(text) == all(number < 1 << 32 for number in numbers)


def test_a_path_that_looks_like_a_key_is_a_path(tmp_path: Path, pair: KeyPair) -> None:
    looks = "x" * 36 + ".key"
    assert is_key(looks)
    assert "there is no" in refusal(lambda: public_key(looks, tmp_path)).problem
    there = "k" * 40
    assert public_key(there, tmp_path) == there
    KeyFiles.of(tmp_path, "b").write(pair)
    (tmp_path / "b.key").rename(tmp_path / there)
    assert public_key(there, tmp_path) == pair.public


def test_a_folder_gives_the_public_keys_in_it(tmp_path: Path) -> None:
    pairs = [KeyPair.new() for _ in range(3)]
    for number, pair in enumerate(pairs):
        KeyFiles.of(tmp_path / "keys", f"node-{number}").write(pair)
    reader = KeyReader(tmp_path)
    assert reader.publics("keys") == [pair.public for pair in pairs]
    assert not reader.watched.has_changed()
    KeyFiles.of(tmp_path / "keys", "node-3").write(KeyPair.new())
    assert reader.watched.has_changed()


def test_a_folder_without_keys_is_refused(tmp_path: Path) -> None:
    assert ".key files" in refusal(lambda: KeyReader(tmp_path).publics(".")).problem


def test_a_fingerprint_is_the_beginning_of_a_key(pair: KeyPair) -> None:
    assert pair.public.startswith(fingerprint(pair.public))
    assert len(fingerprint(pair.public)) == 8
