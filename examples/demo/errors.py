"""What ends the demo early."""

from __future__ import annotations

from lmcache_sglang.errors import LMCacheError


class DemoFailed(LMCacheError):
    """The demo cannot go on; the message is for whoever started it."""
