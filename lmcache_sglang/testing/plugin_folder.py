"""A plug-in of SGLang's (entry-point group ``sglang.srt.plugins``) that only the engines of one test load."""

from __future__ import annotations

from pathlib import Path


def make_plugin(folder: Path, name: str, activate: str) -> dict[str, str]:
    """Write it, and return the environment in which an engine finds it.

    Args:
        name: of the module, an identifier.
        activate: the code that SGLang runs first in each of its processes.
    """
    info = folder / f"{name}-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {name}:activate\n")
    lines = "".join(f"    {line}\n" for line in activate.strip().splitlines())
    (folder / f"{name}.py").write_text(f"def activate():\n{lines}")
    return {"PYTHONPATH": str(folder)}
