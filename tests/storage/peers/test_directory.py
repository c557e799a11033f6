"""What the peers' directory owes: right answers while it grows, and none where there is nothing to believe."""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from shutil import rmtree
from threading import Event

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

from lmcache_sglang.errors import Reason, TierError
from lmcache_sglang.storage.peers import tags as sets
from lmcache_sglang.storage.peers.directory import (
    EVERYBODY,
    LEAST_BYTES,
    NO_RECORD,
    PEERS_MOST,
    Directory,
    DirectoryView,
    PeerRecord,
    Standing,
)
from lmcache_sglang.testing import directory_process
from lmcache_sglang.testing.directory_process import NEVER, keys_of, record_of
from lmcache_sglang.testing.store_process import Job, run
from lmcache_sglang.testing.tier_suite import at_once
from lmcache_sglang.testing.waiting import wait_until

ROOMY = 64 << 20
FIRST_WORDS = 1 << 16  # of the smallest table


@pytest.fixture
def path(shared_memory: Path) -> Path:
    return shared_memory / "peers"


@pytest.fixture
def directory(path: Path) -> Iterator[Directory]:
    with closing(Directory.create(path, ROOMY)) as made:
        yield made


@pytest.fixture
def view(directory: Directory, path: Path) -> Iterator[DirectoryView]:
    with closing(DirectoryView(path, silent_seconds=600)) as opened:
        yield opened


def tags(numbers: range) -> bytes:
    return sets.tags_of(keys_of(numbers))


def masks(view: DirectoryView, numbers: range, among: int = EVERYBODY) -> list[int]:
    return list(struct.unpack(f"<{len(numbers)}Q", view.holders(keys_of(numbers), among)))


def files(path: Path) -> list[str]:
    return sorted(file.name for file in path.parent.iterdir())


def test_a_page_is_found_with_all_who_hold_it(directory: Directory, view: DirectoryView) -> None:
    held = {0: range(100), 7: range(50, 150), 63: range(99, 100)}
    for peer, numbers in held.items():
        assert directory.put(peer, tags(numbers)) == 0
        directory.believe(peer)
    numbers = range(200)
    wanted = [sum(1 << p for p in held if n in held[p]) for n in numbers]
    assert masks(view, numbers) == wanted
    assert view.exists(keys_of(numbers)) == [mask != 0 for mask in wanted]
    assert view.exists([]) == []
    assert view.holders([]) == b""


def test_only_peers_that_are_asked_for_and_believed_count(
    directory: Directory, view: DirectoryView
) -> None:
    for peer in (1, 2, 3):
        directory.put(peer, tags(range(10)))
    assert masks(view, range(10)) == [0] * 10
    directory.believe(1)
    directory.believe(2)
    assert masks(view, range(10)) == [0b110] * 10
    assert masks(view, range(10), among=0b1100) == [0b100] * 10
    assert view.exists(keys_of(range(10)), among=0b1000) == [False] * 10
    directory.doubt(2)
    assert masks(view, range(10)) == [0b10] * 10
    assert (directory.believed, view.believed) == (0b10, 0b10)


def test_a_page_that_a_peer_tells_twice_is_kept_once(
    directory: Directory, view: DirectoryView
) -> None:
    directory.put(4, tags(range(100)) * 3)
    directory.put(4, tags(range(50, 150)))
    assert directory.pages(4) == directory.stats().live == 150
    assert directory.drop(4, tags(range(120)) * 2) == 120
    directory.believe(4)
    assert masks(view, range(150)) == [0] * 120 + [1 << 4] * 30


@pytest.mark.parametrize("tag", [0, 63, 64, 2**64 - 1, 2**64 - 64, 2**64 - 65])
def test_no_tag_is_taken_for_an_empty_or_an_erased_word(
    directory: Directory, view: DirectoryView, tag: int
) -> None:
    key = bytes(16) + tag.to_bytes(8, "little") + bytes(24)
    directory.believe(63)
    directory.believe(0)
    assert view.exists([key]) == [False]
    for peer in (0, 63):
        directory.put(peer, tag.to_bytes(8, "little"))
    assert struct.unpack("<Q", view.holders([key])) == (1 << 63 | 1,)
    directory.drop(63, tag.to_bytes(8, "little"))
    assert struct.unpack("<Q", view.holders([key])) == (1,)
    assert directory.stats().live == 1


def test_pages_of_another_namespace_have_other_tags() -> None:
    key = keys_of(range(1))[0]
    assert sets.tags_of([key]) == key[16:24], "of a namespace of zeros"
    other = b"\1" * 16 + key[16:]
    assert sets.tags_of([other]) == bytes(byte ^ 1 for byte in key[16:24])
    with pytest.raises(ValueError, match="48 bytes"):
        sets.tags_of([key[1:]])


def test_it_grows_and_who_reads_follows(
    directory: Directory, view: DirectoryView, path: Path
) -> None:
    pages = 3 * FIRST_WORDS
    directory.believe(5)
    before = files(path)
    for first in range(0, pages, pages // 6):
        assert directory.put(5, tags(range(first, first + pages // 6))) == 0
    assert all(view.exists(keys_of(range(pages)))), "without a refresh"
    assert not any(view.exists(keys_of(NEVER)))
    stats = directory.stats()
    assert (stats.live, stats.left_out) == (pages, 0)
    assert stats.generation > 1
    assert pages <= 0.7 * stats.words
    assert len(files(path)) == len(before) == 2, "the old table is gone"
    assert sum(file.stat().st_size for file in path.parent.iterdir()) == stats.bytes


def test_beyond_its_bytes_pages_are_left_out_and_counted(path: Path) -> None:
    with closing(Directory.create(path, LEAST_BYTES)) as directory:
        view = DirectoryView(path)
        directory.believe(0)
        pages = 2 * FIRST_WORDS
        left_out = directory.put(0, tags(range(pages)))
        assert 0 < left_out < pages
        assert sum(view.exists(keys_of(range(pages)))) == pages - left_out == directory.pages(0)
        assert directory.stats().left_out == left_out
        assert sum(file.stat().st_blocks * 512 for file in path.parent.iterdir()) <= LEAST_BYTES
        directory.drop(0, tags(range(pages)))
        assert directory.put(0, tags(range(10_000))) == 0, "there is room again"
        assert all(view.exists(keys_of(range(10_000))))


def test_what_is_erased_makes_room_without_growth(directory: Directory) -> None:
    for turn in range(60):
        numbers = range(turn * 20_000, (turn + 1) * 20_000)
        assert directory.put(turn % PEERS_MOST, tags(numbers)) == 0
        if turn % 2:
            directory.forget(turn % PEERS_MOST)
        else:
            directory.drop(turn % PEERS_MOST, tags(numbers))
    stats = directory.stats()
    assert (stats.live, stats.words) == (0, FIRST_WORDS)


def test_a_full_medium_leaves_pages_out_and_breaks_nothing(path: Path) -> None:
    left_out, found, missed = run(
        directory_process.put_with_small_files, path, 2 * FIRST_WORDS, 1 << 20
    )
    assert left_out > 0 < found
    assert missed == 0


def test_a_medium_without_room_for_the_first_table_is_an_error_and_leaves_no_file(
    path: Path,
) -> None:
    assert run(directory_process.create_with_small_files, path, 100_000) == Reason.FULL.value
    with pytest.raises(ValueError, match="at least"):
        Directory.create(path, LEAST_BYTES - 1)
    with pytest.raises(TierError) as caught:
        Directory.create(path.parent / "absent" / "peers", ROOMY)
    assert caught.value.reason is Reason.IO


def test_a_forgotten_peer_has_no_page_and_the_others_keep_theirs(
    directory: Directory, view: DirectoryView
) -> None:
    for peer in range(PEERS_MOST):
        directory.put(peer, tags(range(300)))
        directory.believe(peer)
    directory.set_record(9, PeerRecord(name="nine"))
    directory.forget(9)
    assert masks(view, range(300)) == [EVERYBODY & ~(1 << 9)] * 300
    directory.believe(9)
    assert masks(view, range(300)) == [EVERYBODY & ~(1 << 9)] * 300, "erased, not hidden"
    assert (directory.pages(9), directory.pages(8)) == (0, 300)
    assert view.record(9).name == "nine"


def test_records_come_back_as_they_were_written(directory: Directory, view: DirectoryView) -> None:
    full = PeerRecord(
        "ä" * 32, "t" * 256, b"k" * 40, 255, 2**16 - 1, 2**64 - 1, 2**32 - 1, 2**32 - 1
    )
    directory.set_record(0, full)
    directory.set_record(63, record_of(5))
    assert (view.record(0), view.record(63), view.record(1)) == (full, record_of(5), NO_RECORD)
    directory.set_pulse(63, 17, 18)
    assert (view.record(63).rtt_us, view.record(63).load) == (17, 18)
    for wrong in (PeerRecord("ä" * 33), PeerRecord("", "t" * 257), PeerRecord("", "", b"k" * 41)):
        with pytest.raises(ValueError, match="too long"):
            directory.set_record(0, wrong)
    assert view.record(0) == full


def test_changes_advance_with_all_but_the_pulse(directory: Directory, view: DirectoryView) -> None:
    seen = {view.changes}
    for record in (
        PeerRecord("a"),
        PeerRecord("a", "b"),
        PeerRecord("a", "b", b"c"),
        PeerRecord("a", "b", b"c", 1),
        PeerRecord("a", "b", b"c", 1, 1),
        PeerRecord("a", "b", b"c", 1, 1, 1),
    ):
        directory.set_record(2, record)
        assert view.changes not in seen, record
        seen.add(view.changes)
        directory.set_record(2, PeerRecord(*record_fields(record), rtt_us=9, load=9))
        directory.set_pulse(2, 5, 6)
        assert view.changes in seen


def record_fields(record: PeerRecord) -> tuple[str, str, bytes, int, int, int]:
    return (
        record.name,
        record.address,
        record.public_key,
        record.state,
        record.version,
        record.epoch,
    )


def test_peers_that_there_cannot_be_are_refused(directory: Directory, view: DirectoryView) -> None:
    for call in (directory.believe, directory.doubt, directory.forget, directory.pages):
        with pytest.raises(ValueError, match="0 to 63"):
            call(64)
    for change in (directory.put, directory.drop):
        with pytest.raises(ValueError, match="0 to 63"):
            change(64, b"")
        with pytest.raises(ValueError, match="8 bytes"):
            change(0, b"seven b")
    with pytest.raises(ValueError, match="0 to 63"):
        view.record(64)
    with pytest.raises(ValueError, match="48 bytes"):
        view.exists([b"short"])


def test_a_closed_directory_is_believed_no_more(
    directory: Directory, view: DirectoryView, path: Path
) -> None:
    directory.put(0, tags(range(10)))
    directory.believe(0)
    assert all(view.exists(keys_of(range(10))))
    directory.close()
    directory.close()
    assert not any(view.exists(keys_of(range(10))))
    assert masks(view, range(10)) == [0] * 10
    assert view.standing is view.refresh() is Standing.CLOSED
    assert files(path) == []
    for change in (directory.put, directory.drop):
        with pytest.raises(TierError) as caught:
            change(0, tags(range(1)))
        assert caught.value.reason is Reason.CLOSED
    directory.beat()
    directory.doubt(0)


def test_another_agent_takes_its_place(
    directory: Directory, view: DirectoryView, path: Path
) -> None:
    directory.put(0, tags(range(10)))
    directory.believe(0)
    assert (view.agent, all(view.exists(keys_of(range(10))))) == (directory.agent, True)
    with closing(Directory.create(path, ROOMY)) as other:
        assert view.standing is Standing.CLOSED
        assert not any(view.exists(keys_of(range(10))))
        assert view.refresh() is Standing.READY
        assert view.agent == other.agent != directory.agent
        assert not any(view.exists(keys_of(range(10)))), "of the one before"
        directory.put(0, tags(range(FIRST_WORDS)))  # it does not know yet, and must do no harm
        directory.close()
        other.put(1, tags(range(10)))
        other.believe(1)
        assert view.refresh() is Standing.READY
        assert masks(view, range(10)) == [2] * 10
        assert len(files(path)) == 2
    assert files(path) == []


def test_one_who_reads_may_come_first(path: Path) -> None:
    view = DirectoryView(path)
    assert view.standing is view.refresh() is Standing.ABSENT
    assert view.exists(keys_of(range(3))) == [False] * 3
    assert (view.record(0), view.changes, view.believed, view.agent) == (NO_RECORD, 0, 0, 0)
    with closing(Directory.create(path, ROOMY)) as directory:
        directory.put(0, tags(range(3)))
        directory.believe(0)
        assert view.refresh() is Standing.READY
        assert view.exists(keys_of(range(3))) == [True] * 3
        view.close()
        assert view.exists(keys_of(range(3))) == [False] * 3
        assert view.standing is Standing.ABSENT


def test_an_agent_that_does_not_beat_is_believed_no_more(path: Path) -> None:
    with closing(Directory.create(path, ROOMY)) as directory:
        directory.put(0, tags(range(3)))
        directory.believe(0)
        patient, hasty = DirectoryView(path, 600), DirectoryView(path, 0.02)
        wait_until(lambda: hasty.standing is Standing.SILENT)
        assert hasty.exists(keys_of(range(3))) == [False] * 3
        assert hasty.refresh() is Standing.SILENT
        assert patient.exists(keys_of(range(3))) == [True] * 3
        wait_until(lambda: _beat_and_look(directory, hasty))


def _beat_and_look(directory: Directory, view: DirectoryView) -> bool:
    directory.beat()
    return view.exists(keys_of(range(3))) == [True] * 3


def foreign_heads(good: bytes) -> dict[str, bytes]:
    return {
        "empty": b"",
        "another program's": os.urandom(len(good)),
        "another version's": good[:7] + b"\xff" + good[8:],
        "too short": good[:-1],
        "too long": good + b"\0",
    }


def test_a_head_of_another_kind_is_no_directory(directory: Directory, path: Path) -> None:
    elsewhere = path.parent / "elsewhere"
    view = DirectoryView(elsewhere)
    for name, content in foreign_heads(path.read_bytes()).items():
        elsewhere.write_bytes(content)
        assert view.refresh() is Standing.FOREIGN, name
        assert view.exists(keys_of(range(3))) == [False] * 3
        assert view.record(0) == NO_RECORD
        elsewhere.unlink()
    elsewhere.mkdir()
    assert view.refresh() is Standing.FOREIGN
    elsewhere.rmdir()
    elsewhere.symlink_to(path)
    assert view.refresh() is Standing.FOREIGN
    elsewhere.unlink()
    os.mkfifo(elsewhere)
    assert view.refresh() is Standing.FOREIGN, "and it does not wait for a writer"
    elsewhere.unlink()
    assert view.refresh() is Standing.ABSENT


def foreign_tables(good: bytes) -> dict[str, bytes]:
    return {
        "empty": b"",
        "another program's": os.urandom(len(good)),
        "another agent's": good[:8] + os.urandom(8) + good[16:],
        "too short": good[:-64],
        "of no line": good[:32] + bytes(8) + good[40:],
        "of more lines than it has": good[:32] + struct.pack("<Q", 1 << 60) + good[40:],
    }


def test_a_table_of_another_kind_is_no_directory(directory: Directory, path: Path) -> None:
    directory.put(0, tags(range(3)))
    directory.believe(0)
    (table,) = path.parent.glob("peers.*")
    good = table.read_bytes()
    for name, content in foreign_tables(good).items():
        table.unlink()
        table.write_bytes(content)
        view = DirectoryView(path)
        assert view.refresh() is Standing.FOREIGN, name
        assert view.exists(keys_of(range(3))) == [False] * 3
    table.unlink()
    assert DirectoryView(path).refresh() is Standing.FOREIGN
    table.write_bytes(good)
    assert DirectoryView(path).exists(keys_of(range(3))) == [True] * 3


def test_files_are_for_their_user_alone(directory: Directory, path: Path) -> None:
    assert [file.stat().st_mode & 0o777 for file in path.parent.iterdir()] == [0o600] * 2


def test_a_process_that_reads_sees_all_pages_while_the_table_grows(path: Path) -> None:
    pages, seen = 4 * FIRST_WORDS, path.parent / "seen"
    reader = Job(directory_process.read_pages, path, pages, seen)
    writer = Job(directory_process.write_pages, path, pages, seen)
    try:
        assert reader.result() > 1
    finally:
        writer.kill()
    (table,) = path.parent.glob("peers.*")
    assert table.name.split("-")[1] != "1", "it never grew"


def test_threads_may_read_while_one_writes(directory: Directory, view: DirectoryView) -> None:
    directory.believe(0)
    written, pages = Event(), 3 * FIRST_WORDS
    keys = keys_of(range(pages))

    def write() -> None:
        for first in range(0, pages, 1000):
            directory.put(0, sets.tags_of(keys[first : first + 1000]))
        written.set()

    def read() -> None:
        while not written.is_set():
            assert not any(view.exists(keys_of(NEVER)))
            known = directory.pages(0)
            assert all(view.exists(keys[:known]))

    at_once(write, read, read)
    assert all(view.exists(keys))


def test_a_record_is_whole_while_another_process_writes_it(path: Path) -> None:
    writer = Job(directory_process.write_records_for_ever, path)
    try:
        _wait_for_record(path)
        assert run(directory_process.read_records, path, 1.0) > 10
    finally:
        writer.kill()


def _wait_for_record(path: Path) -> None:
    view = DirectoryView(path, 600)
    wait_until(lambda: view.refresh() is Standing.READY and view.record(0) != NO_RECORD)


def _wait_for_silence(view: DirectoryView) -> None:
    wait_until(lambda: view.refresh() is Standing.SILENT)


def test_what_a_killed_agent_leaves_is_replaced(path: Path) -> None:
    """Whatever it was about."""
    for number in range(5):
        writer = Job(directory_process.write_records_for_ever, path)
        _wait_for_record(path)
        view = DirectoryView(path, 0.05)
        writer.kill()
        _wait_for_silence(view)
        assert view.record(0) == record_of(view.record(0).epoch) != NO_RECORD
        if number % 2:
            path.write_bytes(b"damaged")
    (path.parent / "peers.new").write_bytes(b"left over")
    kept = path.parent / "peers.of-the-user"
    kept.write_bytes(b"")
    with closing(Directory.create(path, ROOMY)) as directory:
        assert DirectoryView(path).agent == directory.agent
        assert len(files(path)) == 3, "no table of the others is left"
    assert files(path) == [kept.name]


def test_an_agent_that_is_killed_while_it_grows_leaves_what_it_told(path: Path) -> None:
    seen = path.parent / "seen"
    writer = Job(directory_process.write_pages, path, 2 * FIRST_WORDS, seen)
    run(directory_process.read_pages, path, 2 * FIRST_WORDS, seen)
    view = DirectoryView(path, 600)
    writer.kill()
    assert all(view.exists(keys_of(range(2 * FIRST_WORDS)))), "until it is silent for too long"
    with closing(Directory.create(path, ROOMY)):
        assert view.refresh() is Standing.READY
        assert not any(view.exists(keys_of(range(1000))))


numbers = st.integers(0, 40).map(lambda n: range(n * 1000, n * 1000 + 7000))
peers = st.sampled_from([0, 1, 31, 63])


class Machine(RuleBasedStateMachine):
    """The real thing beside a dict of sets."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="lmcache-test-"))
        self.directory = Directory.create(self.folder / "peers", ROOMY)
        self.view = DirectoryView(self.folder / "peers", 600)
        self.held: dict[int, set[int]] = {peer: set() for peer in (0, 1, 31, 63)}
        self.believed: set[int] = set()
        self.records: dict[int, PeerRecord] = {}

    @rule(peer=peers, numbers=numbers)
    def put(self, peer: int, numbers: range) -> None:
        assert self.directory.put(peer, tags(numbers)) == 0
        self.held[peer] |= set(numbers)

    @rule(peer=peers, numbers=numbers)
    def drop(self, peer: int, numbers: range) -> None:
        gone = self.held[peer] & set(numbers)
        assert self.directory.drop(peer, tags(numbers)) == len(gone)
        self.held[peer] -= gone

    @rule(peer=peers)
    def forget(self, peer: int) -> None:
        self.directory.forget(peer)
        self.held[peer].clear()
        self.believed.discard(peer)

    @rule(peer=peers)
    def believe(self, peer: int) -> None:
        self.directory.believe(peer)
        self.believed.add(peer)

    @rule(peer=peers)
    def doubt(self, peer: int) -> None:
        self.directory.doubt(peer)
        self.believed.discard(peer)

    @rule(peer=peers, number=st.integers(1, 5))
    def set_record(self, peer: int, number: int) -> None:
        before = self.view.changes
        self.directory.set_record(peer, record_of(number))
        assert (self.view.changes == before) == (self.records.get(peer) == record_of(number))
        self.records[peer] = record_of(number)

    @rule()
    def refresh(self) -> None:
        assert self.view.refresh() is Standing.READY

    @rule()
    def replace(self) -> None:
        self.directory.close()
        self.directory = Directory.create(self.folder / "peers", ROOMY)
        for held in self.held.values():
            held.clear()
        self.believed.clear()
        self.records.clear()
        assert masks(self.view, range(10)) == [0] * 10
        assert self.view.refresh() is Standing.READY

    @invariant()
    def agrees(self) -> None:
        asked = range(0, 48_000, 37)
        wanted = [
            sum(1 << peer for peer in self.believed if number in self.held[peer])
            for number in asked
        ]
        assert masks(self.view, asked) == wanted
        assert self.view.exists(keys_of(asked)) == [mask != 0 for mask in wanted]
        assert all(self.directory.pages(peer) == len(held) for peer, held in self.held.items())
        assert self.directory.stats().live == sum(map(len, self.held.values()))
        for peer in self.held:
            assert self.view.record(peer) == self.records.get(peer, NO_RECORD)

    def teardown(self) -> None:
        self.view.close()
        self.directory.close()
        left = list(self.folder.iterdir())
        rmtree(self.folder)
        assert left == []


def test_any_order_of_use_answers_as_a_dict_would() -> None:
    run_state_machine_as_test(
        Machine, settings=settings(max_examples=15, stateful_step_count=25, deadline=None)
    )
