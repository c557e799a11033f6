"""The one variable of this package; it is SGLang's own."""

from __future__ import annotations

import os

VARIABLE = "SGLANG_USE_CPU_ENGINE"


def active() -> bool:
    """Whether SGLang itself would take the CPU (sglang.srt.utils.common.is_cpu asks the same)."""
    return os.environ.get(VARIABLE) == "1"
