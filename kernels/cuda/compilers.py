"""The two ways from source to cubin: NVRTC, which users of SGLang have, and nvcc, of the toolkit or of NVIDIA's packages.

NVRTC is reached through `cuda.bindings`: every version of `cuda-python`, which SGLang requires, brings it, while
`cuda.core` comes with some only.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Protocol

from ...errors import CudaUnavailableError
from . import sources

NVCC_PACKAGE = "nvidia-cuda-nvcc"
NO_BINDINGS = "cuda.bindings is not installed: pip install cuda-python"
NO_NVCC = (
    "nvcc is neither on PATH nor in this environment: install the CUDA toolkit, or "
    "pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime, all of one minor version"
)
COMPILE_SECONDS = 300.0


class Compiler(Protocol):
    @property
    def name(self) -> str:
        """With its version, fit for a file's name."""

    def compile(self, arch: str) -> bytes:
        """A cubin of the kernels.

        Args:
            arch: for example sm_90.

        Raises:
            CudaUnavailableError: it does not know this architecture, or not our source; says what it said.
        """


class Nvrtc:
    """NVIDIA's compiler as a library; needs no headers and no other compiler.

    Raises:
        CudaUnavailableError: it is not installed.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import nvrtc
        except ImportError as error:
            raise CudaUnavailableError(NO_BINDINGS) from error
        self._nvrtc: Any = nvrtc
        try:
            major, minor = self._call("nvrtcVersion")
        except RuntimeError as error:  # what cuda.bindings raises where the library is not found
            raise CudaUnavailableError(
                f"NVRTC is not installed: pip install nvidia-cuda-nvrtc ({error})"
            ) from error
        self.name = f"nvrtc-{major}.{minor}"

    def compile(self, arch: str) -> bytes:
        known = [f"sm_{number}" for number in self._call("nvrtcGetSupportedArchs")[0]]
        if arch not in known:
            raise CudaUnavailableError(f"{self.name} knows no {arch}, only {', '.join(known)}")
        headers = [sources.text(name) for name in sources.HEADERS]
        names = [name.encode() for name in sources.HEADERS]
        (program,) = self._call(
            "nvrtcCreateProgram",
            sources.text(sources.KERNELS),
            sources.KERNELS.encode(),
            len(headers),
            headers,
            names,
        )
        try:
            return self._compile(program, arch)
        finally:
            self._call("nvrtcDestroyProgram", program)

    def _compile(self, program: object, arch: str) -> bytes:
        options = [f"--gpu-architecture={arch}".encode(), f"--std={sources.STANDARD}".encode()]
        (result,) = self._nvrtc.nvrtcCompileProgram(program, len(options), options)
        if result != self._nvrtc.nvrtcResult.NVRTC_SUCCESS:
            (size,) = self._call("nvrtcGetProgramLogSize", program)
            said = self._written("nvrtcGetProgramLog", program, size)
            text = said.rstrip(b"\0").decode(errors="replace")
            raise CudaUnavailableError(f"{self.name} does not compile our kernels: {text}")
        (size,) = self._call("nvrtcGetCUBINSize", program)
        return self._written("nvrtcGetCUBIN", program, size)

    def _written(self, name: str, program: object, size: int) -> bytes:
        """What NVRTC writes in place into bytes: cuda.bindings' way. Those of length 1 are shared by all of Python."""
        room = bytes(size + 1)
        self._call(name, program, room)
        return room[:size]

    def _call(self, name: str, *args: object) -> Any:
        result, *values = getattr(self._nvrtc, name)(*args)
        if result != self._nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CudaUnavailableError(f"{name}: {result.name}")
        return values


class Nvcc:
    """NVIDIA's compiler as a command; wants a C++ compiler beside it.

    Args:
        command: its path; None: the one on PATH, or that of NVIDIA's package.

    Raises:
        CudaUnavailableError: there is none.
    """

    def __init__(self, command: Path | None = None) -> None:
        found = command or _nvcc_on_path() or _nvcc_of_package()
        if found is None:
            raise CudaUnavailableError(NO_NVCC)
        self._command = found
        said = self._run("--version")
        version = re.search(r"\bV(\d+\.\d+\.\d+)", said)
        if version is None:
            raise CudaUnavailableError(f"{found} --version does not say which it is: {said}")
        self.name = f"nvcc-{version[1]}"

    def compile(self, arch: str) -> bytes:
        with tempfile.TemporaryDirectory(prefix="lmcache-nvcc-") as folder:
            out = Path(folder) / "kernels.cubin"
            options = ["-cubin", f"-arch={arch}", f"-std={sources.STANDARD}", "-o", str(out)]
            self._run(*options, str(sources.FOLDER / sources.KERNELS))
            return out.read_bytes()

    def _run(self, *args: str) -> str:
        try:
            done = subprocess.run(
                [self._command, *args],
                check=False,
                capture_output=True,
                text=True,
                timeout=COMPILE_SECONDS,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CudaUnavailableError(f"{self._command}: {error}") from error
        if done.returncode != 0:
            raise CudaUnavailableError(f"{self._command} {' '.join(args)}: {done.stderr.strip()}")
        return done.stdout


def _nvcc_on_path() -> Path | None:
    found = shutil.which("nvcc")
    return Path(found) if found else None


def _nvcc_of_package() -> Path | None:
    """NVIDIA's packages share a folder that is laid out as a toolkit is, so it finds its headers by itself."""
    try:
        files = importlib.metadata.files(NVCC_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (Path(str(file.locate())) for file in files if file.name == "nvcc")
    return next((path for path in found if os.access(path, os.X_OK)), None)
