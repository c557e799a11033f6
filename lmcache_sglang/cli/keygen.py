"""``lmcache-sglang keygen``: a node's keys."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..storage.peers.keys import KeyFiles, KeyPair
from ..storage.peers.settings import NAME, PORT, default_name

if TYPE_CHECKING:
    from argparse import _SubParsersAction

EPILOG = """\
Makes NAME.key, the public key, and NAME.key_secret, which only its owner may read. The secret one stays on its
node; the public one goes to the nodes that are to connect to it, as text or as the file.

examples:
  lmcache-sglang keygen
  lmcache-sglang keygen --out /etc/lmcache/keys --name node-a
"""


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "keygen",
        help="make a node's keys",
        description="Make the keys that a node encrypts with and is known by.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="DIR", help="the folder (default: this one)"
    )
    parser.add_argument(
        "--name",
        type=_name,
        default=default_name(),
        help="of the node and of the files (default: %(default)s)",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace files that are there; peers need the new key"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Make them. Returns the exit status."""
    pair, files = KeyPair.new(), KeyFiles.of(options.out, options.name)
    try:
        files.write(pair, force=options.force)
    except FileExistsError as error:
        print(f"{error}; --force replaces both keys", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"cannot write to {options.out}: {error.strerror}", file=sys.stderr)
        return 1
    print(_explained(options.name, pair, files))
    return 0


def _name(text: str) -> str:
    if len(text) > 64 or not re.fullmatch(NAME, text):
        raise argparse.ArgumentTypeError(f"{text!r} is not 1 to 64 of A-Z a-z 0-9 . _ -")
    return text


def _explained(name: str, pair: KeyPair, files: KeyFiles) -> str:
    """What to do with them, as lines of the files that need them; all else is a comment there."""
    secret = json.dumps(str(files.secret.resolve()), ensure_ascii=False)
    return f"""\
# {files.secret} is secret and stays here; {files.public} may go to anybody.
# The public key is {pair.public}

# In this node's peers.yaml:
name: "{name}"
key: {secret}

# In the peers.yaml of the other nodes, with the address of this one:
peers:
  - {{name: "{name}", address: "tcp://{name}:{PORT}", key: "{pair.public}"}}

# Where this node is found without being listed, it must still be allowed:
allow: ["{pair.public}"]"""
