"""The process that has the pages: `python -m benchmarks.sharing_holder MODULE CLASS OPTIONS OUT`.

OUT is the number of an open pipe, on which it says once how it is reached. It ends when whoever tells it what to hold
hangs up, or with SIGTERM.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
from pathlib import Path

from benchmarks.subjects.base import Options
from benchmarks.subjects.sharing import CONTROL, Holder, held_rows
from benchmarks.wire import Message, receive, send


def main() -> int:
    module, name, options, writing = sys.argv[1:]
    with os.fdopen(int(writing), "w") as answers:
        try:
            given = json.loads(options)
            given["directory"] = Path(given["directory"])
            holder: Holder = getattr(importlib.import_module(module), name)(Options(**given))
            control = socket.socket(socket.AF_UNIX)
            path = str(given["directory"] / "control")
            control.bind(path)
            control.listen(1)
        except Exception as error:
            send(answers, {"error": f"{type(error).__name__}: {error}"})
            raise
        send(answers, {**holder.address(), CONTROL: path})
    with control, control.accept()[0] as getter, getter.makefile("rw") as words:
        while (request := receive(words)) is not None:
            send(words, _hold(holder, request))
    holder.close()
    return 0


def _hold(holder: Holder, request: Message) -> Message:
    keys = [bytes.fromhex(key) for key in request["keys"]]
    try:
        holder.hold(keys, held_rows(request["pages"], len(keys)))
    except Exception as error:  # noqa: BLE001 - whatever a peer raises, the report says it
        return {"error": f"{type(error).__name__}: {error}"}
    return {}


if __name__ == "__main__":
    sys.exit(main())
