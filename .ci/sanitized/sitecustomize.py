"""On PYTHONPATH while sanitize.sh runs: the native modules come from the folder that BUILT names.

An editable installation has a finder of its own, which comes before every folder, so this is one more
finder, before that one. Processes that tests start take it over, like LD_PRELOAD.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

_BUILT = Path(os.environ["BUILT"])


class Finder:
    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        match name.split("."):
            case ["lmcache_sglang", part, "_native"]:
                (file,) = (_BUILT / part).glob("_native*.so")
                return spec_from_file_location(name, file)
        return None


sys.meta_path.insert(0, Finder)
