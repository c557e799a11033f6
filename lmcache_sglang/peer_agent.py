"""The process that answers this node's peers: `python -m lmcache_sglang.peer_agent`, started by an engine.

It is told on its standard input what to do, a line of JSON, and ends when that closes: with the engine that started it,
however that ended. On its standard output it says once how it stands: where it listens, or why it cannot.
What it logs goes to the engine's standard error.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from .config import Config
from .errors import ConfigError
from .peer_file import PeerFile
from .peer_node import PeerNode

logger = logging.getLogger(__name__)


def main() -> int:
    """Returns: the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the engine's; it closes our input when it ends
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s peers] %(message)s")
    task = json.loads(sys.stdin.readline())
    config = Config.of(task["config"])
    with ExitStack() as undo:
        try:
            node = PeerNode(config, PeerFile(Path(task["peers"])))
        except ConfigError as error:
            _say({"setting": error.setting, "problem": error.problem})
            return 1
        undo.callback(node.close)
        signal.signal(signal.SIGTERM, lambda *_: node.stop())
        threading.Thread(target=_stop_at_end, args=(sys.stdin, node), daemon=True).start()
        _say({"listening": node.addresses})
        node.run()
    return 0


def _say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


def _stop_at_end(lifeline: TextIO, node: PeerNode) -> None:
    while lifeline.readline():
        pass
    node.stop()


if __name__ == "__main__":
    sys.exit(main())
