"""The stall that engine tests inject, in a process that is no engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from lmcache_sglang.testing.engine import until
from lmcache_sglang.testing.stalling import Stall

PROGRAM = """
import sys
from importlib.metadata import entry_points
from pathlib import Path

from lmcache_sglang.storage import _native

(plugin,) = [each for each in entry_points(group="sglang.srt.plugins") if each.name == "lmcache_stall"]
plugin.load()()
path = Path(sys.argv[1])
path.write_bytes(bytes(4096))
sys.stdin.readline()
print(_native.Device(str(path)).flush(), flush=True)
"""


def test_a_step_waits_until_the_test_lets_go(tmp_path: Path) -> None:
    stall = Stall(tmp_path / "stall", steps=("flush",))
    with program(stall, tmp_path / "file") as running:
        assert running.stdin is not None and running.stdout is not None
        with stall.held():
            running.stdin.write("go\n")
            running.stdin.flush()
            until(lambda: stall.waits == 1)
            assert running.poll() is None
        assert running.stdout.readline() == "0\n"


def program(stall: Stall, file: Path) -> subprocess.Popen[str]:
    variables = [f"{name}={value}" for name, value in stall.env.items()]
    return subprocess.Popen(
        ["env", *variables, sys.executable, "-c", PROGRAM, str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
