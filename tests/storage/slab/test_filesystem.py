"""Where no store can lie, and that it is found out from the kernel's own table."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmcache_sglang.errors import ConfigError
from lmcache_sglang.storage.slab.filesystem import REMOTE, Mount, mount_of, why_not
from lmcache_sglang.storage.slab.opening import Place
from lmcache_sglang.storage.slab.tier import SlabTier

LINES = """\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
23 22 0:21 / {base} rw,relatime shared:1 - xfs /dev/vdb rw
24 23 0:22 / {base}/share rw,relatime shared:2 master:1 - nfs4 server:/export rw,vers=4.2
25 23 0:23 / {base}/a\\040blank rw - tmpfs tmpfs rw
26 23 0:24 / {base}/d\u00edas rw - btrfs /dev/vdc rw
27 23 0:25 / {base}/twice rw - ext4 /dev/vdd rw
28 27 0:26 / {base}/twice rw - overlay overlay rw,lowerdir=/x
29 23 0:27 / {base}/dash rw opt - fuse.sshfs me@host:/ rw
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    file = tmp_path / "mountinfo"
    base = tmp_path / "base"
    for name in ("share", "a blank", "d\u00edas", "twice", "dash"):
        (base / name).mkdir(parents=True)
    file.write_text(LINES.format(base=base))
    return file


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("", "xfs"),
        ("other/not/yet/there", "xfs"),
        ("share", "nfs4"),
        ("share/below/it", "nfs4"),
        ("shared", "xfs"),  # begins like the other's name
        ("a blank/store", "tmpfs"),
        ("d\u00edas/store", "btrfs"),
        ("twice", "overlay"),  # the last one mounted shows
        ("dash/store", "fuse.sshfs"),
        ("../elsewhere", "ext4"),
    ],
)
def test_a_path_lies_in_the_nearest_mount_above_it(table: Path, path: str, kind: str) -> None:
    assert mount_of(table.parent / "base" / path, table).kind == kind


def test_a_link_lies_where_it_leads(table: Path) -> None:
    (table.parent / "link").symlink_to(table.parent / "base" / "share")
    assert mount_of(table.parent / "link" / "store", table).kind == "nfs4"


def test_the_real_table_knows_the_temporary_folder(tmp_path: Path) -> None:
    found = mount_of(tmp_path / "not" / "yet")
    assert found.kind != "unknown"
    assert tmp_path.is_relative_to(found.point)
    assert mount_of(Path("/proc/self")).kind == "proc"


@pytest.mark.parametrize("kind", [*sorted(REMOTE), "fuse.sshfs", "fuse.s3fs", "fuse.juicefs"])
def test_a_network_file_system_is_refused_with_the_reason(kind: str) -> None:
    reason = why_not(Mount(Path("/share"), kind))
    assert reason is not None
    assert kind in reason and "/share" in reason
    assert "network" in reason and "LMDB" in reason


@pytest.mark.parametrize(("kind", "says"), [("overlay", "volume"), ("hugetlbfs", "/dev/shm")])
def test_what_else_is_refused_is_told_where_to_go(kind: str, says: str) -> None:
    reason = why_not(Mount(Path("/"), kind))
    assert reason is not None
    assert says in reason


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "zfs", "tmpfs", "f2fs", "fuseblk"])
def test_a_file_system_of_this_machine_is_fine(kind: str) -> None:
    assert why_not(Mount(Path("/"), kind)) is None


@pytest.fixture(params=["overlay", "hugetlbfs"])
def refused(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A real mount of a kind that is refused, where mounting is allowed."""
    for name in ("lower", "upper", "work", "mounted"):
        (tmp_path / name).mkdir()
    layers = ",".join(f"{name}dir={tmp_path / name}" for name in ("lower", "upper", "work"))
    options = ["-o", layers] if request.param == "overlay" else []
    point = tmp_path / "mounted"
    mount = ["mount", "-t", request.param, *options, request.param, str(point)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(f"not allowed to mount {request.param}")
    yield point
    subprocess.run(["umount", str(point)], check=True)


def test_a_store_on_a_refused_mount_is_not_made(refused: Path) -> None:
    with pytest.raises(ConfigError, match="cannot hold a store") as caught:
        SlabTier(Place(refused / "store", memory=False), 8 << 20)
    assert caught.value.setting == "path"
    assert str(refused) in str(caught.value)
    assert list(refused.iterdir()) == []
