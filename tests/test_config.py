"""The settings: where they come from, which source wins, and what a mistake is told."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from lmcache_sglang import config as config_module
from lmcache_sglang.config import (
    CPU_MOST,
    DISK_MAX,
    DISK_MOST,
    ENVIRONMENT,
    GIB,
    SGLANG_KEYS,
    UNUSED_MOST,
    Config,
    CpuConfig,
    DiskConfig,
    parse_extra,
    read_file,
)
from lmcache_sglang.errors import ConfigError
from lmcache_sglang.sections import keys_of
from lmcache_sglang.storage.slab.opening import Place
from lmcache_sglang.storage.slab.tier import SlabTier

EXTRA = "--hicache-storage-backend-extra-config"
FILES = {
    "settings.yaml": "path: /nvme/pages\ncpu: {size: 1GiB}\n",
    "settings.yml": "path: /nvme/pages\ncpu:\n  size: 1GiB\n",
    "settings.json": '{"path": "/nvme/pages", "cpu": {"size": "1GiB"}}',
    "settings.toml": 'path = "/nvme/pages"\n[cpu]\nsize = "1GiB"\n',
}
SAID_BY_FILES = {"path": "/nvme/pages", "cpu": {"size": "1GiB"}}


@pytest.fixture(autouse=True)
def nobodys_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is set on the machine that runs the tests decides nothing here."""
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def refusal(settings: Mapping[str, Any]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        Config.of({"path": "/somewhere"} | dict(settings))
    return caught.value


# --- where settings come from ---


def test_nothing_at_all_is_a_valid_configuration(tmp_path: Path) -> None:
    config = Config.load()
    assert config.directory == tmp_path / "home" / ".cache" / "lmcache-sglang"
    assert config.cpu.size == config.disk.size == "auto"
    assert config.cpu.bytes(config.cpu.directory(config.directory)) > 0
    assert config.disk.bytes(config.directory) > 0
    assert not config.directory.exists()  # asking for a size makes nothing


@pytest.mark.parametrize("extra", [None, {}])
def test_no_extra_config_is_no_settings(extra: dict[str, Any] | None) -> None:
    assert Config.load(extra) == Config.of({})


@pytest.mark.parametrize("name", FILES)
def test_the_environment_names_a_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / name
    file.write_text(FILES[name])
    monkeypatch.setenv(ENVIRONMENT, str(file))
    assert Config.load() == Config.of(SAID_BY_FILES)


@pytest.mark.parametrize("name", FILES)
def test_the_flag_takes_a_file(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(FILES[name])
    assert parse_extra(f"@{file}") == SAID_BY_FILES


@pytest.mark.parametrize("name", ["settings.YAML", "settings.Json"])
def test_the_suffix_may_be_written_in_capitals(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(FILES[name.lower()])
    assert read_file(file, "x") == SAID_BY_FILES


@pytest.mark.parametrize("text", [None, "", "{}", "null"])
def test_an_empty_flag_is_no_settings(text: str | None) -> None:
    assert parse_extra(text) == {}


@pytest.mark.parametrize("name", ["empty.yaml", "empty.toml"])
def test_an_empty_file_is_no_settings(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("# nothing yet\n")
    assert read_file(tmp_path / name, "x") == {}


def test_the_engine_wins_over_the_file_key_by_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "below.yaml"
    file.write_text("path: /from/file\ncpu: {size: 1GiB}\ndisk: {size: 2GiB}\n")
    monkeypatch.setenv(ENVIRONMENT, str(file))
    config = Config.load({"path": "/from/engine", "cpu": {"size": "3GiB"}})
    assert config.path == Path("/from/engine")
    assert config.cpu.size == 3 * GIB
    assert config.disk.bytes(config.path) == 2 * GIB  # not spoken of by the engine


def test_a_nested_key_does_not_wipe_its_neighbours() -> None:
    below = {"cpu": {"size": 1, "policy": "lru"}, "path": "/a"}
    above = {"cpu": {"size": 2}}
    merged = {"cpu": {"size": 2, "policy": "lru"}, "path": "/a"}
    assert config_module._merge(below, above) == merged
    assert below == {"cpu": {"size": 1, "policy": "lru"}, "path": "/a"}  # nor is a source changed


def test_the_flag_does_not_wipe_a_whole_section_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "below.yaml"
    file.write_text("cpu: {size: 1, policy: lru}\n")
    monkeypatch.setenv(ENVIRONMENT, str(file))
    monkeypatch.setattr(Config, "of", dict)  # what is about to be checked
    merged: object = Config.load({"cpu": {"size": 2}})
    assert merged == {"cpu": {"size": 2, "policy": "lru"}}


@pytest.mark.parametrize("key", sorted(SGLANG_KEYS))
def test_a_key_of_sglang_is_passed_over(key: str) -> None:
    assert Config.load({key: 512}) == Config.of({})


def test_a_key_of_sglang_is_unknown_in_our_own_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang never reads that file, so the key would do nothing there."""
    file = tmp_path / "own.yaml"
    file.write_text("prefetch_threshold: 512\n")
    monkeypatch.setenv(ENVIRONMENT, str(file))
    with pytest.raises(ConfigError, match="prefetch_threshold"):
        Config.load()


# --- the store directory ---


def test_xdg_cache_home_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast/cache")
    assert Config.load().directory == Path("/fast/cache/lmcache-sglang")


@pytest.mark.parametrize("value", ["", "relative/cache"])
def test_an_empty_or_relative_xdg_cache_home_is_ignored(
    value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert Config.load().directory == tmp_path / "home" / ".cache" / "lmcache-sglang"


def test_a_tilde_means_the_home_directory(tmp_path: Path) -> None:
    assert Config.of({"path": "~/pages"}).directory == tmp_path / "home" / "pages"


def test_the_home_of_nobody_is_refused_with_the_setting_named() -> None:
    error = refusal({"path": "~no-such-user/pages"})
    assert error.setting == "path"
    assert "~no-such-user" in str(error)


def test_a_user_without_a_home_is_told_to_give_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    with pytest.raises(ConfigError, match=r"path: .*absolute path"):
        Config.load()


@pytest.mark.parametrize("path", ["pages", "./pages", ""])
def test_a_relative_path_is_refused(path: str) -> None:
    error = refusal({"path": path})
    assert error.setting == "path"
    assert "absolute" in str(error)


@pytest.mark.parametrize(
    ("memory", "says"), [("pages", "absolute"), ("/somewhere", "store directory itself")]
)
def test_shared_memory_that_cannot_be_one_of_its_own_is_refused(memory: str, says: str) -> None:
    error = refusal({"cpu": {"path": memory}})
    assert error.setting == "cpu.path"
    assert says in str(error)


# --- sizes ---


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (1 << 40, 1 << 40),
        ("64GiB", 64 * GIB),
        ("64 GiB", 64 * GIB),
        (" 64gib ", 64 * GIB),
        ("1.5GiB", 3 * GIB // 2),
        (".5GiB", GIB // 2),
        ("64GB", 64 * 10**9),
        ("4096", 4096),
        (4096.0, 4096),
        ("1TiB", 1 << 40),
        (0, 0),
        ("0", 0),
        ("0GiB", 0),
    ],
)
def test_a_size_is_read_as_people_write_it(given: object, wanted: int) -> None:
    cpu = Config.model_validate({"cpu": {"size": given}}).cpu
    assert cpu.bytes(Path("/somewhere")) == wanted
    config = Config.of({"disk": {"size": given}})
    assert config.disk.bytes(Path("/somewhere")) == wanted


@pytest.mark.parametrize(
    "given",
    [
        *(True, False, None, -1, -0.5, 1.5, float("inf"), float("nan")),
        *(
            "",
            " ",
            "lots",
            "-1GiB",
            "1e9",
            "inf",
            "10%",
            "64 GiB of RAM",
            "64 zebibits",
            "AUTOMATIC",
        ),
        *([], {}, ["64GiB"], {"bytes": 1}),
    ],
    ids=repr,
)
@pytest.mark.parametrize("tier", ["cpu", "disk"])
def test_what_is_no_size_is_refused_with_an_example(tier: str, given: object) -> None:
    error = refusal({tier: {"size": given}})
    assert error.setting == f"{tier}.size"
    assert repr(given) in str(error)
    assert '"64GiB"' in str(error)


def test_a_disk_that_no_process_can_map_is_refused() -> None:
    Config.of({"disk": {"size": DISK_MAX}})
    assert refusal({"disk": {"size": DISK_MAX + 1}}).setting == "disk.size"


@pytest.mark.parametrize("nothing", [0, "0", "0GiB"])
def test_both_tiers_off_is_refused(nothing: object) -> None:
    error = refusal({"cpu": {"size": nothing}, "disk": {"size": nothing}})
    assert "cpu.size" in str(error)
    assert "disk.size" in str(error)


class Machine(NamedTuple):
    memory: int  # bytes this process may use
    free: int  # bytes free on the disk


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Machine:
    has = Machine(*request.param)
    monkeypatch.setattr(config_module, "memory_limit", lambda: has.memory)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=has.free))
    return has


@pytest.mark.parametrize("machine", [(16 * GIB, 100 * GIB), (4 * GIB, 5 * GIB)], indirect=True)
def test_an_automatic_size_leaves_most_of_a_small_machine_alone(
    machine: Machine, tmp_path: Path
) -> None:
    config = Config.of({"path": tmp_path})
    assert config.cpu.bytes(tmp_path) == int(0.1 * machine.memory)
    assert config.disk.bytes(tmp_path) == machine.free // 4


@pytest.mark.parametrize("machine", [(2048 * GIB, 8192 * GIB)], indirect=True)
def test_an_automatic_size_is_bounded_on_a_large_machine(machine: Machine, tmp_path: Path) -> None:
    config = Config.of({"path": tmp_path})
    assert config.cpu.bytes(tmp_path) == CPU_MOST
    assert config.disk.bytes(tmp_path) == DISK_MOST


@pytest.mark.parametrize("machine", [(64 * GIB, 2 * GIB)], indirect=True)
def test_an_automatic_memory_leaves_half_of_what_shared_memory_has(
    machine: Machine, tmp_path: Path
) -> None:
    assert CpuConfig().bytes(tmp_path) == GIB


@pytest.mark.parametrize("machine", [(64 * GIB, 64 << 20), (2 * GIB, 64 * GIB)], indirect=True)
def test_too_little_for_a_tier_is_none(machine: Machine, tmp_path: Path) -> None:
    """A container's 64 MB of /dev/shm, or a container that may use little memory."""
    assert CpuConfig().bytes(tmp_path) == 0


@pytest.mark.parametrize("machine", [(GIB, 100 << 20)], indirect=True)
@pytest.mark.parametrize("tier", [CpuConfig(), DiskConfig()], ids=["cpu", "disk"])
def test_an_automatic_size_does_not_shrink_by_what_the_store_holds(
    machine: Machine, tier: CpuConfig | DiskConfig, tmp_path: Path
) -> None:
    """Nor by what others have put beside it since: it would cost pages."""
    (tmp_path / "region").write_bytes(b"\1" * (300 << 20))
    new = tier.bytes(tmp_path)  # no store yet, so the file is somebody else's
    assert new < 300 << 20
    head = tmp_path / "store.json"
    head.write_text("{}")
    size = tier.bytes(tmp_path)
    assert size == (300 << 20) + head.stat().st_blocks * 512 + UNUSED_MOST
    (tmp_path / "not-ours").write_bytes(b"\1" * (1 << 20))
    assert tier.bytes(tmp_path) == size


def test_an_automatic_size_that_shrank_costs_no_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 4 * (20 << 20)
    monkeypatch.setattr(config_module, "_free", lambda path: free)
    sizes, slabs = [], []
    for _ in range(3):
        sizes.append(DiskConfig().bytes(tmp_path))
        tier = SlabTier(Place(tmp_path, memory=False), sizes[-1])
        slabs.append(tier.head.slabs)
        tier.close()
        free = 0  # others have filled the disk
    assert sizes[0] == 20 << 20
    assert len(set(slabs)) == 1


@pytest.mark.parametrize("machine", [(8 * GIB, 100 * GIB)], indirect=True)
def test_more_memory_than_the_container_has_is_refused(machine: Machine) -> None:
    Config.of({"cpu": {"size": "8GiB"}})
    error = refusal({"cpu": {"size": 8 * GIB + 1}})
    assert error.setting == "cpu.size"
    assert str(8 * GIB) in str(error)
    assert "container" in str(error)


def test_each_store_and_each_user_has_shared_memory_of_its_own(shared_memory: Path) -> None:
    one, other = (CpuConfig().directory(Path(path)) for path in ("/nvme/a", "/nvme/b"))
    assert one != other
    assert one.parent == other.parent == shared_memory / f"lmcache-sglang-{os.getuid()}"
    assert CpuConfig().directory(Path("/nvme/a")) == one  # also after a restart


def test_shared_memory_may_lie_elsewhere(tmp_path: Path) -> None:
    config = Config.of({"cpu": {"path": "~/memory"}})
    assert config.cpu.directory(config.directory) == tmp_path / "home" / "memory"


@pytest.mark.parametrize("tier", ["path", "cpu.path"])
def test_memory_that_cannot_be_asked_is_an_error_that_names_the_path(
    tier: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def gone(path: Path) -> object:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(shutil, "disk_usage", gone)
    section = DiskConfig() if tier == "path" else CpuConfig()
    with pytest.raises(ConfigError, match=rf"^{tier}: cannot look at .*Input/output error"):
        section.bytes(tmp_path / "not" / "yet" / "there")


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"cpu": {"eviction": "random"}}, "cpu.eviction"),
        ({"cpu": {"threads": 0}}, "cpu.threads"),
        ({"cpu": {"threads": 65}}, "cpu.threads"),
        ({"cpu": {"huge_pages": "perhaps"}}, "cpu.huge_pages"),
        ({"disk": {"mode": "write-around"}}, "disk.mode"),
        ({"disk": {"admission": "third-touch"}}, "disk.admission"),
        ({"disk": {"minimum_prefix": -1}}, "disk.minimum_prefix"),
        ({"disk": {"promotion": "sometimes"}}, "disk.promotion"),
        ({"disk": {"durability": "eventual"}}, "disk.durability"),
        ({"disk": {"queue_depth": 0}}, "disk.queue_depth"),
        ({"disk": {"engine": "spdk"}}, "disk.engine"),
    ],
    ids=str,
)
def test_a_value_that_is_none_of_its_kind_names_its_key_and_what_was_given(
    settings: dict[str, Any], key: str
) -> None:
    error = refusal(settings)
    assert error.setting == key
    ((value,),) = [section.values() for section in settings.values()]
    assert repr(value) in str(error)


def test_every_setting_is_in_the_manual() -> None:
    manual = (Path(__file__).parents[1] / "docs" / "settings.md").read_text()
    for key in keys_of(Config):
        assert f"`{key}`" in manual, key


@pytest.mark.parametrize(
    ("file", "text", "limit"),
    [
        ("memory.max", "1073741824\n", GIB),
        ("memory.max", "max\n", None),
        ("memory/memory.limit_in_bytes", "1073741824\n", GIB),
        ("memory/memory.limit_in_bytes", "9223372036854771712\n", None),  # version 1's "no limit"
        (None, "", None),
    ],
)
def test_a_container_is_not_taken_for_the_whole_machine(
    file: str | None,
    text: str,
    limit: int | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    if file is not None:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
    monkeypatch.setattr(config_module, "CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1 << 20}.__getitem__)
    assert config_module.memory_limit() == (limit or 4 * GIB)


@pytest.mark.parametrize(
    ("groups", "limits", "limit"),
    [
        ("0::/a/b", {"a/b/memory.max": 2, "a/memory.max": 3}, 2),
        (
            "0::/a/b",
            {"a/b/memory.max": 3, "a/memory.max": 2},
            2,
        ),  # a group is bound by those above it
        ("0::/a/b", {"a/c/memory.max": 1}, 4),
        ("5:cpu,memory:/a", {"memory/a/memory.limit_in_bytes": 1}, 1),
        ("5:cpu:/a\n0::/", {"memory/a/memory.limit_in_bytes": 1, "cpu/a/memory.max": 1}, 4),
        ("0::/../../outside", {"memory.max": 1}, 1),  # of a container that sees another's groups
    ],
)
def test_the_limits_of_a_processs_own_groups_count(
    groups: str,
    limits: dict[str, int],
    limit: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for name, size in limits.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{size * GIB}\n")
    real = config_module._lines
    monkeypatch.setattr(
        config_module,
        "_lines",
        lambda file: groups.splitlines() if file == Path("/proc/self/cgroup") else real(file),
    )
    monkeypatch.setattr(config_module, "CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1 << 20}.__getitem__)
    assert config_module.memory_limit() == limit * GIB


# --- mistakes ---


@pytest.mark.parametrize(
    ("settings", "key", "nearest"),
    [
        ({"pth": "/a"}, "pth", "path"),
        ({"Path": "/a"}, "Path", "path"),
        ({"CPU": {"size": 1}}, "CPU", "cpu"),
        ({"cpu": {"sise": 1}}, "cpu.sise", "cpu.size"),
        ({"disk": {"siz": 1}}, "disk.siz", "disk.size"),
        ({"cpu.size": "1GiB"}, "cpu.size", "cpu.size"),
        ({"peer": "/a"}, "peer", "peers"),
        ({"redirect": True}, "redirect", "direct"),
    ],
)
def test_an_unknown_key_names_the_nearest_valid_one(
    settings: dict[str, Any], key: str, nearest: str
) -> None:
    error = refusal(settings)
    assert error.setting == key
    assert f"did you mean {nearest}?" in str(error)


def test_a_key_near_to_none_is_told_them_all() -> None:
    error = refusal({"xyzzy": 1})
    for key in ("path", "cpu.size", "disk.size", "peers", "direct"):
        assert key in str(error)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"path": None}, "path"),
        ({"path": 5}, "path"),
        ({"cpu": None}, "cpu"),
        ({"cpu": "64GiB"}, "cpu"),
        ({"disk": [1]}, "disk"),
        ({"direct": "maybe"}, "direct"),
        ({"peers": 7}, "peers"),
    ],
)
def test_a_value_of_the_wrong_kind_names_its_key(settings: dict[str, Any], key: str) -> None:
    error = refusal(settings)
    assert error.setting == key
    assert repr(settings[key]) in str(error)
    assert "Config" not in str(error)  # our class names are not the user's words


@pytest.mark.parametrize(
    ("given", "enabled"),
    [(None, False), (False, False), (True, True), ({}, True), ({"landing": "1MiB"}, True)],
)
def test_direct_is_a_switch_or_a_section(given: object, enabled: bool) -> None:
    settings = {} if given is None else {"direct": given}
    assert Config.of(settings).direct.enabled == enabled


def test_an_automatic_landing_is_a_part_of_the_memory_and_a_given_one_is_what_was_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for memory, landing in ((20 << 30, 1 << 30), (1 << 40, 4 << 30)):
        monkeypatch.setattr(config_module, "memory_limit", lambda memory=memory: memory)
        assert Config.of({"direct": True}).direct.bytes == landing
    assert Config.of({"direct": {"landing": "3MiB"}}).direct.bytes == 3 << 20


@pytest.mark.parametrize(
    ("direct", "key"),
    [
        ({"landing": 0}, "direct.landing"),
        ({"landing": "5%"}, "direct.landing"),
        ({"landings": "1MiB"}, "direct.landings"),
        ("yes", "direct"),
    ],
)
def test_a_wrong_direct_names_its_key(direct: object, key: str) -> None:
    assert refusal({"direct": direct}).setting == key


def test_the_peer_sharing_file_is_named_by_its_path() -> None:
    assert Config.of({"peers": "/etc/peers.yaml"}).peers == Path("/etc/peers.yaml")
    assert refusal({"peers": 7}).setting == "peers"


def test_the_lasting_keys_may_be_written_with_their_defaults() -> None:
    assert Config.of({"peers": None, "direct": False}) == Config.of({})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bad.json", '{"path": '),
        ("bad.yaml", "path: [unclosed"),
        ("bad.yml", "a: b: c"),
        ("bad.toml", "path = "),
        ("bad.yaml", "- a\n- b\n"),
        ("bad.json", "[1, 2]"),
        ("bad.json", '"text"'),
        ("bad.ini", "path = /a"),
        ("bad", "path: /a"),
        ("bad.yaml", "\xff"),
        ("missing.yaml", None),
        ("folder.yaml/", None),
    ],
)
def test_a_file_that_cannot_be_used_is_named(
    name: str, text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / name
    if text is not None:
        file.write_text(text, encoding="latin-1")
    elif name.endswith("/"):
        file.mkdir()
    with pytest.raises(ConfigError) as by_flag:
        parse_extra(f"@{file}")
    assert EXTRA in str(by_flag.value)
    assert str(file) in str(by_flag.value)
    monkeypatch.setenv(ENVIRONMENT, str(file))
    with pytest.raises(ConfigError) as by_environment:
        Config.load()
    assert ENVIRONMENT in str(by_environment.value)
    assert str(file) in str(by_environment.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "secret.yaml"
    file.write_text("path: /a")
    file.chmod(0)
    with pytest.raises(ConfigError, match="Permission denied"):
        parse_extra(f"@{file}")


@pytest.mark.parametrize("text", ["{", "path: /a", "[1]", '"x"', "5", "true", "@"])
def test_a_flag_that_is_no_mapping_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_extra(text)
    assert caught.value.setting.startswith(EXTRA)


def test_a_flag_that_looks_like_a_file_is_told_the_at_sign() -> None:
    with pytest.raises(ConfigError, match=r"@/path\.yaml"):
        parse_extra("/etc/lmcache.yaml")


def test_settings_cannot_change_after_they_were_read() -> None:
    config = Config.of({})
    with pytest.raises(ValueError, match="frozen"):
        config.path = Path("/elsewhere")
