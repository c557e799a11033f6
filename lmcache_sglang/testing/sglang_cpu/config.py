"""The one variable of this package; it is SGLang's own."""

from __future__ import annotations

import os

VARIABLE = "SGLANG_USE_CPU_ENGINE"
# What `active` asks, as code that begins a line of its own: it runs where this package may be gone.
IF_ACTIVE = f"import os; os.environ.get('{VARIABLE}') == '1'"


def active() -> bool:
    """Whether SGLang itself would take the CPU (sglang.srt.utils.common.is_cpu asks the same)."""
    return os.environ.get(VARIABLE) == "1"
