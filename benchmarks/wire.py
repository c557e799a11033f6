"""One JSON object a line, in each direction, on two pipes of their own.

Not stdin and stdout: peers print there whatever they like. Needs nothing but the standard library, since
both ends import it, each in its own environment.
"""

from __future__ import annotations

import json
from typing import IO, Any

Message = dict[str, Any]


def send(stream: IO[str], message: Message) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


def receive(stream: IO[str]) -> Message | None:
    """The next message; None at the end of the stream."""
    line = stream.readline()
    if not line.endswith("\n"):
        return None
    message: Message = json.loads(line)
    return message
