"""From a directory and a size to an open store, or a `ConfigError` that says why not.

The first process to open a store has it alone for a moment: it looks at what is there from a child process
(probe.py), makes what is missing at its full size, resizes what the settings have changed, and then lets
the others in. Nothing is changed before everything has been looked at.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ...errors import ConfigError
from .. import _native
from ..base import Below
from . import files, filesystem, head, huge_pages, probe
from .head import Head
from .lock import InUse
from .plan import Plan
from .settings import SlabSettings

logger = logging.getLogger(__name__)

SHARED_PREFIX = "lmcache-sglang-"  # of the directory in shared memory that holds a user's stores
PROBE_SECONDS = 60.0  # longest look at an index

EXPECTED = probe.Expected(
    tables=["meta", "index", "orphans", "pins", "quotas"],
    lengths={"index": (48, 48), "orphans": (24, 4), "pins": (48, 4), "quotas": (16, 8)},
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a store lies, and what the user calls it.

    Attributes:
        path_setting, size_setting: for messages, for example ``path`` and ``disk.size``.
    """

    directory: Path
    memory: bool
    path_setting: str = "path"
    size_setting: str = "disk.size"


@dataclass(frozen=True, slots=True)
class Opened:
    store: _native.SlabStore
    in_use: InUse
    head: Head
    capacity: int  # bytes that hold: another process may have opened it with another number before


def open_store(place: Place, capacity: int, settings: SlabSettings, below: Below) -> Opened:
    """Open the store, and make it when it is not there.

    Args:
        capacity: bytes of all its files together. A process that does not come first takes the store as
            it is.

    Raises:
        ConfigError: it cannot be used as asked; names the setting and the fix.
    """
    _make_directory(place)
    with ExitStack() as undo:
        in_use = InUse(place.directory, place.path_setting)
        undo.callback(in_use.close)
        if in_use.alone:
            opened = _open_alone(place, capacity, settings, below, in_use)
            in_use.share()
        else:
            opened = _open_shared(place, settings, below)
        undo.pop_all()
    store, its_head = opened
    logger.info(
        "lmcache: %s, %d slabs of %.0f MB, %s",
        place.directory,
        its_head.slabs,
        its_head.slab_bytes / 1e6,
        store.describe(),
    )
    return Opened(store, in_use, its_head, _capacity(place, capacity, its_head))


def _capacity(place: Place, wanted: int, its_head: Head) -> int:
    holds = its_head.plan.total
    try:
        if Plan.of(wanted, its_head.slab_bytes).slabs == its_head.slabs:
            return wanted
    except ValueError:
        pass  # less than one slab: it is not what the first process asked for either
    logger.warning(
        "lmcache: %s: %d bytes, but %s is open in another process with %d, which holds until all have closed it",
        place.size_setting,
        wanted,
        place.directory,
        holds,
    )
    return holds


def _make_directory(place: Place) -> None:
    path, setting = place.directory, place.path_setting
    try:
        if reason := filesystem.why_not(filesystem.mount_of(path)):
            raise ConfigError(setting, f"{path} cannot hold a store: {reason}")
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ConfigError(setting, f"{path} is a file; give a directory") from error
    except OSError as error:
        raise ConfigError(setting, f"cannot make the directory {path}: {error.strerror}") from error
    _require_trusted(place)


def _require_trusted(place: Place) -> None:
    """Who can write here can give us pages, and a checksum is no proof of who wrote them."""
    shared = place.memory and place.directory.parent.name.startswith(SHARED_PREFIX)
    for path in (place.directory, place.directory.parent) if shared else (place.directory,):
        status = path.stat()
        if status.st_uid not in (0, os.geteuid()):
            owner = f"user {status.st_uid}"
        elif status.st_mode & stat.S_IWOTH:
            owner = "everybody"
        else:
            continue
        raise ConfigError(
            place.path_setting,
            f"{path} can be written to by {owner}, who could put pages there; give a directory that only "
            "the engine's user can write to",
        )


def _open_alone(
    place: Place, capacity: int, settings: SlabSettings, below: Below, in_use: InUse
) -> tuple[_native.SlabStore, Head]:
    files.require_files(place.directory, place.path_setting)
    (place.directory / files.INDEX_COPY).unlink(missing_ok=True)  # of a start that was killed
    found = head.read(place.directory, place.path_setting)
    if found is not None and place.memory and not _index_is_sound(place):
        logger.warning("lmcache: %s was damaged; what it held is lost", place.directory)
        files.remove_own(place.directory)
        found = None
    if found is None:
        return _make(place, capacity, settings, below)
    _require_sound(place)
    if not files.whole_slabs(place.directory, found):
        logger.warning(
            "lmcache: %s was shortened until it held no page, or its making was interrupted: made anew",
            place.directory / files.REGION,
        )
        files.remove_own(place.directory)
        return _make(place, capacity, settings, below)
    if not _has_index(place):  # what the control file lists is nowhere any more
        (place.directory / files.CONTROL).unlink(missing_ok=True)
    found = _mended(place, found, settings, below)
    wanted = _plan(place, capacity, found.slab_bytes)
    if wanted.slabs != found.slabs:  # for what it remembers beside, nothing is made anew
        found = _resized(place, found, wanted, settings, below, in_use)
    store = _opened(place, found, settings, below)
    if store.counts()["pages"] or _plan(place, capacity).slab_bytes <= found.slab_bytes:
        return store, found
    del (
        store
    )  # an empty one, for pages smaller than it could now keep: it was made by a refused start
    files.remove_own(place.directory)
    return _make(place, capacity, settings, below)


def _plan(place: Place, capacity: int, slab_bytes: int = 0) -> Plan:
    try:
        return Plan.of(capacity, slab_bytes)
    except ValueError as error:
        raise ConfigError(place.size_setting, f"{error}; give it more") from error


def _make(
    place: Place, capacity: int, settings: SlabSettings, below: Below
) -> tuple[_native.SlabStore, Head]:
    files.require_empty(place.directory, place.path_setting)
    made = Head.new(_plan(place, capacity))
    with ExitStack() as undo:
        undo.callback(files.remove_own, place.directory)
        _write_head(place, made)
        store = _opened(place, made, settings, below)
        undo.pop_all()
    return store, made


def _write_head(place: Place, content: Head) -> None:
    try:
        head.write(place.directory, content)
    except OSError as error:
        raise ConfigError(
            place.path_setting, f"cannot write in {place.directory}: {error.strerror}"
        ) from error


def _opened(
    place: Place, its_head: Head, settings: SlabSettings, below: Below
) -> _native.SlabStore:
    """For who has the store alone: everything at its size, then opened."""
    directory, plan = place.directory, its_head.plan
    _allocate(place, plan)
    store = _native_store(place, its_head, settings, below, alone=True)
    # Not before: LMDB takes a file of zeros for a damaged one.
    files.allocate(directory / files.INDEX, plan.index_bytes, place.size_setting)
    if lost := store.damaged_at_open():
        logger.warning(
            "lmcache: %s: %d pages had no place any more and were forgotten", directory, lost
        )
    return store


def _allocate(place: Place, plan: Plan) -> None:
    files.allocate(place.directory / files.REGION, plan.region_bytes, place.size_setting)
    files.allocate(place.directory / files.CONTROL, plan.control_bytes, place.size_setting)


def _open_shared(
    place: Place, settings: SlabSettings, below: Below
) -> tuple[_native.SlabStore, Head]:
    found = head.read(place.directory, place.path_setting)
    if found is None or not files.sizes_fit(place.directory, found.plan):
        raise ConfigError(
            place.path_setting,
            f"{place.directory} is open in another process, and its files are not as that one made them; "
            "stop all engines that use it, and start again",
        )
    store = _native_store(place, found, settings, below, alone=False)
    _tell_disagreement(place, store.agreed(), settings, below)
    return store, found


def _sync(place: Place, settings: SlabSettings) -> str:
    return "volatile" if place.memory else "durable" if settings.durable else "ordered"


def _tell_disagreement(
    place: Place, agreed: dict[str, str], settings: SlabSettings, below: Below
) -> None:
    asked = {
        "policy": ("eviction", settings.eviction),
        "below": ("mode and admission", below.value),
        "sync": ("durability", _sync(place, settings)),
    }
    for name, (setting, wanted) in asked.items():
        if agreed[name] == wanted:
            continue
        logger.warning(
            "lmcache: %s: %s asked for here is %s, but the process that opened it first was told %s, "
            "which holds for all until they have closed it",
            place.directory,
            setting,
            wanted,
            agreed[name],
        )


def _native_store(
    place: Place, its_head: Head, settings: SlabSettings, below: Below, *, alone: bool
) -> _native.SlabStore:
    plan = its_head.plan
    options = {
        "directory": str(place.directory),
        "medium": "memory" if place.memory else "file",
        "alone": alone,
        "slab_bytes": plan.slab_bytes,
        "slabs": plan.slabs,
        "slots_per_slab": plan.slots_per_slab,
        "ghosts": plan.ghosts,
        "index_bytes": plan.index_bytes,
        "pages_most": plan.pages_most,
        "sync": _sync(place, settings),
        "policy": settings.eviction,
        "below": below.value,
        "threads": settings.threads,
        "huge_pages": huge_pages.asked_for(settings.huge_pages),
        "queue_depth": settings.queue_depth,
        "engine": settings.engine,
        "direct": settings.direct,
        "id": bytes.fromhex(its_head.id),
    }
    try:
        return _native.SlabStore(options)
    except _native.StoreFailure as failure:
        _, detail = failure.args
        raise ConfigError(
            place.path_setting, f"cannot open {place.directory}: {detail}"
        ) from failure


def _mended(place: Place, its_head: Head, settings: SlabSettings, below: Below) -> Head:
    """A region that was shortened by hand holds fewer pages, and is whole again after that."""
    slabs = files.whole_slabs(place.directory, its_head)
    if slabs == its_head.slabs:
        return its_head
    logger.warning(
        "lmcache: %s was shortened: it holds %d of %d slabs; the pages of the others are forgotten",
        place.directory / files.REGION,
        slabs,
        its_head.slabs,
    )
    _forget_beyond(place, its_head, slabs, settings, below)
    return its_head


def _resized(
    place: Place,
    its_head: Head,
    wanted: Plan,
    settings: SlabSettings,
    below: Below,
    in_use: InUse,
) -> Head:
    logger.info(
        "lmcache: %s: from %.2f to %.2f GB",
        place.directory,
        its_head.plan.total / 1e9,
        wanted.total / 1e9,
    )
    if wanted.slabs < its_head.slabs:
        _forget_beyond(place, its_head, wanted.slabs, settings, below)
        _allocate(place, wanted)  # first: what it frees is room for the index's smaller copy
        _shrink_index(place, wanted, in_use)
    else:  # before the head says so: a full disk then leaves the store as it was
        _allocate(place, wanted)
    resized = its_head.resized(wanted)
    _write_head(place, resized)
    return resized


def _forget_beyond(
    place: Place, its_head: Head, slabs: int, settings: SlabSettings, below: Below
) -> None:
    """Leave only pages that lie in the first slabs."""
    fewer = its_head.resized(
        Plan(its_head.slab_bytes, its_head.plan.slots_per_slab, slabs, its_head.ghosts)
    )
    (place.directory / files.CONTROL).unlink(missing_ok=True)  # made anew from the index
    files.allocate(place.directory / files.CONTROL, fewer.plan.control_bytes, place.size_setting)
    store = _native_store(place, fewer, settings, below, alone=True)
    logger.warning("lmcache: %s: %d pages were forgotten", place.directory, store.damaged_at_open())
    del store
    (place.directory / files.CONTROL).unlink()


def _shrink_index(place: Place, wanted: Plan, in_use: InUse) -> None:
    index = place.directory / files.INDEX
    if index.stat().st_size <= wanted.index_bytes:
        return
    copy = place.directory / files.INDEX_COPY
    copy.unlink(missing_ok=True)
    # If this process is killed, nobody opens the store before the child has ended too.
    found = _probe("compact", index, str(copy), keep=(in_use.file,))
    if found["state"] != "ours" or copy.stat().st_size > wanted.index_bytes:
        copy.unlink(missing_ok=True)
        raise ConfigError(
            place.size_setting,
            f"{index} could not be made smaller ({found['detail']}); give it as much "
            "as before, or delete the store",
        )
    head.sync(copy)  # whole on the disk, before it takes the other one's name
    copy.replace(index)
    head.sync(place.directory)
    (place.directory / files.INDEX_LOCK).unlink(missing_ok=True)


def _has_index(place: Place) -> bool:
    index = place.directory / files.INDEX
    return index.exists() and index.stat().st_size > 0


def _index_is_sound(place: Place) -> bool:
    index = place.directory / files.INDEX
    return not _has_index(place) or _probe("look", index, json.dumps(EXPECTED))["state"] == "ours"


def _require_sound(place: Place) -> None:
    index = place.directory / files.INDEX
    if not _has_index(place) or place.memory:
        return
    found = _probe("look", index, json.dumps(EXPECTED))
    if found["state"] == "foreign":
        raise ConfigError(
            place.path_setting, f"{index} belongs to another program; give a directory of our own"
        )
    if found["state"] != "ours":
        raise ConfigError(
            place.path_setting,
            f"{index} is damaged ({found['detail']}); nothing was deleted: move the directory away or delete "
            "it, and the next start makes a new store",
        )


def _probe(task: str, index: Path, argument: str, keep: Sequence[int] = ()) -> dict[str, str]:
    """What a child process finds. Args: keep: descriptors that it inherits."""
    command = [sys.executable, "-I", probe.__file__, task, str(index), argument]
    try:
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            pass_fds=keep,
        )
    except OSError as error:
        raise ConfigError(
            "path", f"cannot start {sys.executable} to look at {index}: {error.strerror}"
        ) from error
    except subprocess.TimeoutExpired:
        return probe.verdict("damaged", f"it could not be read in {PROBE_SECONDS:.0f} s")
    if done.returncode < 0:
        return probe.verdict("damaged", f"reading it ends a process with signal {-done.returncode}")
    if done.returncode > 0:
        return probe.verdict("damaged", done.stderr.strip().rpartition("\n")[2])
    answer: dict[str, str] = json.loads(done.stdout)
    return answer
