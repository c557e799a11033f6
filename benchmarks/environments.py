"""The environments that peers and the plot have of their own, made when they are first needed."""

from __future__ import annotations

import subprocess

from benchmarks.catalog import CACHE, ROOT, SGLANG_VENV


def make(name: str) -> str | None:
    """Make an environment unless it is there; why it could not be made."""
    script = ROOT / "benchmarks" / "peers" / "make_venv.sh"
    command = [str(script), name, str(CACHE / name), str(SGLANG_VENV)]
    done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return next((line for line in lines if line.startswith("ERROR")), lines[-1])
