"""Compiles the kernels ahead of time, for machines where NVRTC is missing or a start should compile nothing.

python -m lmcache_sglang.kernels.cuda --arch sm_90 --into DIR
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from ...errors import CudaUnavailableError
from .compilers import Compiler, Nvcc, Nvrtc
from .cubins import Cubins


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m lmcache_sglang.kernels.cuda",
        description="Compiles the copy kernels ahead of time. A GPU is not needed.",
    )
    parser.add_argument(
        "--arch", action="append", required=True, help="for example sm_90; may be given again"
    )
    parser.add_argument(
        "--into", type=Path, required=True, help="the folder of cubins that the copier is given"
    )
    parser.add_argument("--compiler", choices=["nvcc", "nvrtc"], default="nvcc")
    parser.add_argument(
        "--nvcc", type=Path, help="its path (default: that on PATH, or of NVIDIA's packages)"
    )
    options = parser.parse_args(arguments)
    try:
        compiler: Compiler = Nvcc(options.nvcc) if options.compiler == "nvcc" else Nvrtc()
        for arch in options.arch:
            if not re.fullmatch(r"sm_\d+", arch):
                parser.error(f"--arch: {arch!r} is not like sm_90, as a GPU is looked for")
            print(Cubins(options.into).keep(arch, compiler.name, compiler.compile(arch)))
    except (CudaUnavailableError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
