"""The command, as it is started by hand: processes of their own, real files, real sockets."""

from __future__ import annotations

import argparse
import json
import re
import socket
import stat
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from lmcache_sglang.cli import __main__ as command
from lmcache_sglang.cli.reaching import Reach, reachable
from lmcache_sglang.cli.sizes import count_of, size
from lmcache_sglang.peer_file import PeerFile
from lmcache_sglang.simulation import POLICIES
from lmcache_sglang.storage.peers.keys import KeyPair, is_key

HEAVY = {"torch", "numpy", "sglang", "vllm", "lmdb", "asyncio"}


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lmcache_sglang.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=cwd,
    )


def keygen(folder: Path, name: str) -> str:
    """Returns: the public key."""
    made = run("keygen", "--out", folder, "--name", name)
    assert made.returncode == 0, made.stderr
    (public,) = re.findall(r"The public key is (\S+)", made.stdout)
    return str(public)


def settings(folder: Path, text: str) -> Path:
    path = folder / "peers.yaml"
    path.write_text(text)
    return path


# --- the command itself ---


def test_version() -> None:
    assert run("--version").stdout == f"lmcache-sglang {version('lmcache-sglang')}\n"


@pytest.mark.parametrize(
    "words", [[], ["keygen"], ["peers"], ["peers", "check"], ["simulate"]], ids=str
)
def test_help_is_everywhere(words: list[str]) -> None:
    said = run(*words, "--help")
    assert said.returncode == 0
    assert said.stdout.startswith("usage: lmcache-sglang")
    if words != ["peers"]:
        assert "examples:\n  lmcache-sglang" in said.stdout


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["peer"],
        ["peers"],
        ["peers", "check"],
        ["peers", "check", "--seconds", "nan", "x"],
        ["peers", "check", "--seconds", "0", "x"],
        ["peers", "check", "--seconds", "soon", "x"],
        ["keygen", "--name", "a/b"],
        ["keygen", "--name", ""],
        ["keygen", "more"],
    ],
    ids=str,
)
def test_wrong_arguments(words: list[str]) -> None:
    said = run(*words)
    assert said.returncode == 2
    assert said.stderr.startswith("usage: lmcache-sglang")
    assert said.stdout == ""


@pytest.mark.parametrize("words", [["--version"], ["peers", "check", "peers.yaml"]], ids=str)
def test_it_starts_without_an_engine(words: list[str], tmp_path: Path) -> None:
    settings(tmp_path, "listen: tcp://127.0.0.1:7801\n")
    code = f"""
import sys
from lmcache_sglang.cli.__main__ import main
try:
    main({words!r})
except SystemExit:
    pass
print(*sys.modules, file=sys.stderr)
"""
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    loaded = set(said.stderr.split())
    assert "lmcache_sglang.cli.peers" in loaded
    assert not HEAVY & loaded


def test_the_installed_script_is_the_same_command() -> None:
    scripts = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'lmcache-sglang = "{command.__name__}:main"' in scripts
    assert callable(command.main)


# --- keygen ---


def test_keygen_makes_two_files_with_safe_modes(tmp_path: Path) -> None:
    public = keygen(tmp_path / "new" / "keys", "node-a")
    assert is_key(public)
    folder = tmp_path / "new" / "keys"
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {"node-a.key": 0o644, "node-a.key_secret": 0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    pair = KeyPair.load(folder / "node-a.key_secret")
    assert pair.public == public


def test_keygen_shows_no_secret(tmp_path: Path) -> None:
    made = run("keygen", "--name", "node-a", cwd=tmp_path)
    assert KeyPair.load(tmp_path / "node-a.key_secret").secret not in made.stdout + made.stderr


def test_what_keygen_prints_can_be_pasted(tmp_path: Path) -> None:
    """Twenty times, since keys have all kinds of characters."""
    for number in range(20):
        made = KeyPair.new()
        assert yaml.safe_load(f'"{made.public}"') == made.public, number
    folder = tmp_path / "with space"
    printed = run("keygen", "--out", folder, "--name", "node-a").stdout
    here, others = printed.split("# In the peers.yaml of the other nodes")
    loaded = PeerFile(settings(folder, here)).load()
    assert loaded.name == "node-a"
    assert loaded.key == KeyPair.load(folder / "node-a.key_secret")
    keygen(folder, "node-b")
    body = others.split("\n", 1)[1]
    there = PeerFile(settings(folder, f"name: node-b\nkey: node-b.key_secret\n{body}")).load()
    assert [each.node for each in there.known] == ["node-a"]
    assert loaded.own_key in there.allow


def test_keygen_replaces_nothing_unless_forced(tmp_path: Path) -> None:
    first = keygen(tmp_path, "node-a")
    again = run("keygen", "--out", tmp_path, "--name", "node-a")
    assert again.returncode == 1
    assert again.stdout == ""
    assert re.fullmatch(r".*node-a\.key is there already; --force .*\n", again.stderr)
    assert KeyPair.load(tmp_path / "node-a.key_secret").public == first
    assert run("keygen", "--out", tmp_path, "--name", "node-a", "--force").returncode == 0
    assert KeyPair.load(tmp_path / "node-a.key_secret").public != first


def test_keygen_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = run("keygen", "--out", tmp_path / "file" / "keys", "--name", "a")
    assert said.returncode == 1
    assert re.fullmatch(r"cannot write to .*: Not a directory\n", said.stderr)


# --- peers check ---


def test_check_explains_the_file(tmp_path: Path) -> None:
    own, other = (keygen(tmp_path / "keys", name) for name in ("node-a", "node-b"))
    path = settings(
        tmp_path,
        """
name: node-a
key: keys/node-a.key_secret
advertise: tcp://node-a:7801
peers: [{name: node-b, address: "tcp://node-b:7801", key: keys/node-b.key}]
limits: {bandwidth: 1.5GiB, in_flight: 32MiB}
share: {models: ["meta-*"], minimum_prefix: 4}
keep: second-hit
""",
    )
    said = run("peers", "check", path)
    assert said.returncode == 0, said.stderr
    assert said.stderr == ""
    for line in (
        r"node +node-a",
        r"listens at +tcp://0\.0\.0\.0:7801",
        r"advertises +tcp://node-a:7801",
        rf"encryption +CURVE, own public key {re.escape(own)}",
        rf"peer +node-b tcp://node-b:7801 key {re.escape(other[:8])}…",
        rf"allows +2 keys: its own, {re.escape(other[:8])}…",
        r"serves +1\.5 GiB/s, 32 MiB of memory,",
        r"shares +models meta-\*; all namespaces, chains of 4 pages and more",
        r"keeps +pages of peers: second-hit",
    ):
        assert re.search(rf"^{line}$", said.stdout, re.MULTILINE), line
    assert "note" not in said.stdout
    secret = KeyPair.load(tmp_path / "keys" / "node-a.key_secret").secret
    assert secret not in said.stdout


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("listen: tcp://127.0.0.1:1", "peers: neither"),
        ("listen: []", "listen: it is empty, and nobody is listed"),
        ("insecure: true\nadvertise: tcp://a:1", "insecure: nothing is encrypted"),
        ("listen: ipc:///run/x\nlimits: {window: 1GiB}", "limits.window"),
    ],
)
def test_check_says_what_is_probably_not_meant(tmp_path: Path, text: str, note: str) -> None:
    said = run("peers", "check", settings(tmp_path, text))
    assert said.returncode == 0
    assert re.search(rf"^note +{re.escape(note)}", said.stdout, re.MULTILINE)


@pytest.mark.parametrize("text", ["limit: {}", "", "key: gone.key_secret", "listen: ["])
def test_check_says_in_one_line_what_is_wrong(tmp_path: Path, text: str) -> None:
    path = settings(tmp_path, text)
    said = run("peers", "check", path)
    assert said.returncode == 1
    assert said.stdout == ""
    assert said.stderr.startswith("peers: ")
    assert str(path) in said.stderr
    assert "Traceback" not in said.stderr
    assert said.stderr.count("\n") == 1


def test_check_tries_the_addresses(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        is_open, is_shut = server.getsockname()[1], nobody.getsockname()[1]
        path = settings(
            tmp_path,
            f"""
listen: tcp://127.0.0.1:7801
peers:
  - {{name: b, address: "tcp://localhost:{is_open}"}}
  - {{name: c, address: "tcp://127.0.0.1:{is_shut}"}}
  - {{name: d, address: "ipc://{tmp_path}/gone"}}
insecure: true
dns: {{name: 127.0.0.1, port: {is_open}}}
""",
        )
        said = run("peers", "check", "--connect", "--seconds", 20, path)
    assert said.returncode == 0, said.stderr
    assert re.findall(r"^(\d/\d) +(\S+) (\S+)", said.stdout, re.MULTILINE) == [
        ("1/4", f"tcp://localhost:{is_open}", "open"),
        ("2/4", f"tcp://127.0.0.1:{is_shut}", "refused"),
        ("3/4", f"ipc://{tmp_path}/gone", "refused"),
        ("4/4", f"tcp://127.0.0.1:{is_open}", "open"),
    ]
    assert re.search(r"^connected +to 2 of 4$", said.stdout, re.MULTILINE)


# --- its parts ---


def test_what_does_not_answer_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: object) -> socket.socket:
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", silent)
    reached = reachable("tcp://10.0.0.1:1", 2.0)
    assert (reached.reach, reached.detail) == (Reach.UNREACHABLE, "no answer in 2 s")


def test_a_host_that_nobody_knows_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> socket.socket:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", unknown)
    reached = reachable("tcp://node-b:1", 2.0)
    assert (reached.reach, reached.detail) == (Reach.UNREACHABLE, "Name or service not known")


def test_a_socket_in_the_file_system(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        assert reachable(f"ipc://{tmp_path}/s", 2.0).reach is Reach.REFUSED
        server.listen()
        assert reachable(f"ipc://{tmp_path}/s", 2.0).reach is Reach.OPEN


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 bytes"),
        (1, "1 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (64 << 20, "64 MiB"),
        (3 << 29, "1.5 GiB"),
        (1 << 49, "512 TiB"),
        ((1 << 50) - 1, "1024 TiB"),
    ],
)
def test_sizes_in_human_units(count: int, said: str) -> None:
    assert size(count) == said


@pytest.mark.parametrize(
    ("said", "count"),
    [("1", 1), ("512", 512), ("1.5KiB", 1536), ("64 MiB", 64 << 20), ("2TiB", 2 << 40)],
)
def test_and_read_again(said: str, count: int) -> None:
    assert count_of(said) == count


@pytest.mark.parametrize(
    "said", ["", "0", "0.1", "-1", "64MB", "1e9", "9" * 400, "MiB", "8388608TiB"]
)
def test_what_is_no_size_is_refused(said: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no size"):
        count_of(said)


# --- simulate ---


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Three chats of two turns, one after the other."""
    file = tmp_path / "trace.jsonl"
    turns = [[chat, chat + 1, chat + 2][: 2 + turn] for chat in (0, 10, 20) for turn in (0, 1)]
    file.write_text("".join(json.dumps({"hash_ids": turn}) + "\n" for turn in turns))
    return file


def test_a_trace_is_simulated(trace: Path) -> None:
    said = run("simulate", trace, "--blocks", "2,100", "--policy", "lru,belady", "--json")
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout)
    assert [(each["policy"], each["blocks"]) for each in found] == [
        ("lru", 2),
        ("lru", 100),
        ("belady", 2),
        ("belady", 100),
    ]
    assert [each["hit_rate"] for each in found] == [6 / 15] * 4


def test_and_shown_as_a_table(trace: Path) -> None:
    said = run("simulate", trace, "--blocks", "100")
    assert said.returncode == 0, said.stderr
    assert "6 requests, 15 blocks, 9 different" in said.stdout
    assert said.stdout.splitlines()[1] == "hit rate:"
    rows = dict(line.split() for line in said.stdout.splitlines()[3:])
    assert rows == dict.fromkeys(POLICIES, "0.400") | {"second-touch": "0.000"}


MODEL = ("--block-bytes", "1MiB", "--block-tokens", "64")
SPEEDS = ("--compute-speed", "1000", "--load-speed", "64MiB")


@pytest.fixture
def timed(tmp_path: Path) -> Path:
    """Four requests in 3 s, two blocks each, the second half as the first."""
    file = tmp_path / "timed.jsonl"
    requests = [{"timestamp": 1000 * at, "hash_ids": [at % 2, 2 + at % 2]} for at in range(4)]
    file.write_text("".join(json.dumps(request) + "\n" for request in requests))
    return file


def test_writes_and_time_saved_are_estimated(timed: Path) -> None:
    said = run("simulate", timed, "--blocks", "2,4", "--policy", "lru", *MODEL, *SPEEDS, "--json")
    assert said.returncode == 0, said.stderr
    narrow, wide = json.loads(said.stdout)
    assert (narrow["hit_blocks"], narrow["written_blocks"]) == (0, 8)
    assert (wide["hit_blocks"], wide["written_blocks"]) == (4, 4)
    assert narrow["written_bytes"] == 8 << 20
    assert wide["written_bytes_a_day"] == pytest.approx((4 << 20) / 3 * 86_400)
    assert narrow["ttft_saved_seconds"] == 0
    # One block of 64 tokens takes 64 ms to compute and 1/64 s to load; a request hits one.
    assert wide["ttft_saved_seconds"] == pytest.approx(0.064 - 1 / 64)


def test_estimates_are_tables_of_their_own(timed: Path) -> None:
    said = run("simulate", timed, "--blocks", "4", "--policy", "lru", *MODEL, *SPEEDS)
    assert said.returncode == 0, said.stderr
    lines = said.stdout.splitlines()
    assert lines[lines.index("written a day:") + 2].split() == ["lru", "112.5", "GiB"]
    assert lines[lines.index("first token earlier by, on average:") + 2].split()[1] == "0.048"


def test_writes_of_a_trace_without_times_are_told_in_all(trace: Path) -> None:
    words = ("simulate", trace, "--blocks", "100", "--policy", "lru", *MODEL)
    (found,) = json.loads(run(*words, "--json").stdout)
    assert found["written_bytes"] == 9 << 20
    assert not {"written_bytes_a_day", "ttft_saved_seconds"} & set(found)
    lines = run(*words).stdout.splitlines()
    assert lines[lines.index("written:") + 2].split() == ["lru", "9", "MiB"]


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["--block-bytes", "1MB"], 2, "'1MB' is no size, as 64MiB is one"),
        (["--block-tokens", "0"], 2, "'0' is no number of tokens"),
        (["--compute-speed", "nan"], 2, "'nan' is no number of tokens a second"),
        (["--compute-speed", "0"], 2, "'0' is no number of tokens a second"),
        (SPEEDS, 2, "--block-bytes must be given too"),
        (["--load-speed", "1GiB"], 2, "--block-bytes and --compute-speed must be given too"),
        ([*MODEL, *SPEEDS[:2]], 2, "--load-speed must be given too"),
        (["--blocks", "0"], 2, "'0' is no number of blocks"),
        (["--blocks", "many"], 2, "'many' is no number of blocks"),
        (["--policy", "lru,best"], 2, "'best' is none of default, lru"),
    ],
)
def test_what_cannot_be_simulated_is_said(
    trace: Path, words: list[str], status: int, says: str
) -> None:
    said = run("simulate", trace, *words)
    assert said.returncode == status
    assert says in said.stderr


def test_a_file_that_is_no_trace_gives_one_line(tmp_path: Path) -> None:
    for file in (tmp_path / "nothing", tmp_path, Path(__file__)):
        said = run("simulate", file)
        assert said.returncode == 1
        assert said.stderr.count("\n") == 1
        assert str(file) in said.stderr


@pytest.mark.parametrize(
    ("suffix", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")]
)
def test_a_simulation_is_drawn(timed: Path, tmp_path: Path, suffix: str, begins: bytes) -> None:
    picture = tmp_path / f"picture{suffix}"
    said = run("simulate", timed, "--blocks", "2,4", *MODEL, *SPEEDS, "--plot", picture)
    assert said.returncode == 0, said.stderr
    assert "hit rate:" in said.stdout
    assert picture.read_bytes().startswith(begins)


def test_the_picture_has_a_line_a_policy_and_a_panel_a_figure(timed: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.svg"
    words = ("simulate", timed, "--blocks", "2,4", "--policy", "default,lru", "--plot", picture)
    assert run(*words, "--json").returncode == 0
    assert drawn(picture) == {"hit rate", "default", "lru", "2", "4"}
    assert run(*words, *MODEL, *SPEEDS).returncode == 0
    more = {"written a day", "first token earlier by, on average"}
    assert drawn(picture) == {"hit rate", "default", "lru", "2", "4"} | more


def test_what_is_nothing_is_drawn_as_well(tmp_path: Path) -> None:
    file, picture = tmp_path / "trace.jsonl", tmp_path / "picture.png"
    file.write_text('{"hash_ids": [1], "timestamp": 0}\n{"hash_ids": [2], "timestamp": 9}\n')
    words = ("--policy", "belady", "--blocks", "1", *MODEL, *SPEEDS, "--plot", picture)
    said = run("simulate", file, *words)
    assert said.returncode == 0, said.stderr
    assert picture.exists()


def drawn(picture: Path) -> set[str]:
    """What of interest is written in an SVG; matplotlib draws letters, and comments each text."""
    words = {"hit rate", "written a day", "first token earlier by, on average", *POLICIES, "2", "4"}
    return words & set(re.findall(r"<!-- (.+?) -->", picture.read_text()))


def test_a_picture_that_cannot_be_drawn_gives_one_line(timed: Path, tmp_path: Path) -> None:
    said = run("simulate", timed, "--blocks", "2", "--plot", tmp_path / "nowhere" / "picture.png")
    assert said.returncode == 1
    assert "hit rate:" in said.stdout  # the work is not lost
    # Before it, matplotlib may have told of a cache of its own.
    assert said.stderr.splitlines()[-1] == (
        f"{tmp_path}/nowhere/picture.png cannot be written: No such file or directory"
    )
    assert "Traceback" not in said.stderr
    said = run("simulate", timed, "--blocks", "2", "--plot", "picture.bmp")
    assert said.returncode == 2
    assert "'picture.bmp' does not end with .png or .svg or .pdf" in said.stderr


def test_without_matplotlib_the_way_to_it_is_said(
    timed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("lmcache_sglang.cli.simulation_plot", "matplotlib.figure"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delattr("lmcache_sglang.cli.simulation_plot", raising=False)
    assert command.main(["simulate", str(timed), "--blocks", "2", "--plot", "x.png"]) == 1
    assert "pip install 'lmcache-sglang[plot]'" in capsys.readouterr().err
