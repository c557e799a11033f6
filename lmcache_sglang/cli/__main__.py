"""``lmcache-sglang``, also as ``python -m lmcache_sglang.cli``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

from ..errors import LMCacheError
from . import keygen, peers, simulate

COMMANDS = (keygen, peers, simulate)

EPILOG = """\
examples:
  lmcache-sglang keygen --out /etc/lmcache/keys     make this node's keys
  lmcache-sglang peers check /etc/lmcache/peers.yaml  explain the peer-sharing file
  lmcache-sglang simulate trace.jsonl               what a cache would have served of a trace

Each command has a --help of its own. Exit status: 0: done; 1: it cannot be done, and one line on stderr
says why; 2: wrong arguments.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="lmcache-sglang",
        description="A KV-cache store for SGLang and vLLM: nodes that share pages, and caches simulated.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"lmcache-sglang {version('lmcache-sglang')}"
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except LMCacheError as error:
        print(*str(error).split(), file=sys.stderr)  # a parser's own words may be several lines
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
