"""Start the example: `.venv-sglang/bin/python examples/prefill_decode/run.py --help`."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    # In place of this script's own folder, whose module names are only meant inside the package.
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    runpy.run_module("examples.prefill_decode", run_name="__main__", alter_sys=True)
