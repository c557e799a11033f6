"""Who starts this node's agent: one engine process of the node, and another one when that ends.

Every process that opens the store with `peers` has a guardian; the one that holds the lock runs the agent as its child and
starts it again when it dies. The kernel lets go of the lock with the process, and the agent ends with whoever started it.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import logging
import os
import selectors
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from random import SystemRandom
from threading import Event, Thread
from typing import Any

from .config import Config
from .errors import ConfigError
from .storage.peers.backoff import Backoff

logger = logging.getLogger(__name__)

LOCK = "guardian"
LOOK_SECONDS = 1.0  # between looks at the lock; no wait for a file lock can be ended
START_SECONDS = 30.0  # that an agent may take until it answers
END_SECONDS = 5.0


class Guardian:
    """The thread, and the agent if it is this process's.

    Args:
        folder: of the directory.
        peers: the peer-sharing file.

    Raises:
        ConfigError: the agent says that it cannot work so; names the setting.
    """

    def __init__(self, config: Config, peers: Path, folder: Path) -> None:
        self._task = json.dumps({"config": config.model_dump(mode="json"), "peers": str(peers)})
        self._stop = Event()
        self._backoff = Backoff(SystemRandom())
        self._agent: subprocess.Popen[str] | None = None
        self._lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if self._is_elected():
                self._start()
        except ConfigError:
            os.close(self._lock)
            raise
        self._thread = Thread(target=self._run, name="lmcache-peers", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def close(self) -> None:
        """End the agent, if it is ours; another process of the node starts its own. Idempotent."""
        atexit.unregister(self.close)
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        os.close(self._lock)

    def _is_elected(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _run(self) -> None:
        while not self._stop.is_set():
            self._look()
            self._stop.wait(LOOK_SECONDS)
        self._end()

    def _look(self) -> None:
        if self._agent is None:
            if self._is_elected():
                self._try_to_start()
        elif self._agent.poll() is not None:
            logger.error(
                "lmcache: the process that answers peers ended with status %s; it is started again",
                self._agent.returncode,
            )
            _let_go(self._agent)
            self._agent = None
            self._stop.wait(self._backoff.pause())

    def _try_to_start(self) -> None:
        """Once an engine serves, a file that was right before costs it no request."""
        try:
            self._start()
        except ConfigError as error:
            logger.error("lmcache: no pages are shared with peers: %s", error)
            self._stop.wait(self._backoff.pause())

    def _start(self) -> None:
        """Raises: ConfigError."""
        command = [sys.executable, "-m", "lmcache_sglang.peer_agent"]
        try:
            agent = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # what ends an engine by the keyboard is not for it
            )
        except OSError as error:  # no memory, no process, no descriptor
            problem = f"the process that answers peers cannot be started: {error}"
            raise ConfigError("peers", problem) from error
        said = _answer(agent, self._task)
        if "listening" in said:
            self._agent = agent
            self._backoff.succeeded()
            where = ", ".join(said["listening"]) or "no address"
            logger.info("lmcache: peers are answered at %s", where)
            return
        _let_go(agent)
        raise ConfigError(said["setting"], said["problem"])

    def _end(self) -> None:
        if self._agent is not None:
            _let_go(self._agent)
        self._agent = None


def _answer(agent: subprocess.Popen[str], task: str) -> dict[str, Any]:
    """How an agent that was just started stands."""
    assert agent.stdin is not None and agent.stdout is not None
    with suppress(BrokenPipeError):  # it ended already, and said why
        agent.stdin.write(task + "\n")
        agent.stdin.flush()
    with selectors.DefaultSelector() as selector:
        selector.register(agent.stdout, selectors.EVENT_READ)
        if not selector.select(START_SECONDS):
            return _failed(f"the process that answers peers says nothing for {START_SECONDS:.0f} s")
    line = agent.stdout.readline()
    if not line:
        status = agent.wait()
        return _failed(f"the process that answers peers ended with status {status}; see above")
    try:
        answer: dict[str, Any] = json.loads(line)
    except ValueError:  # something else writes to its standard output
        return _failed(f"the process that answers peers says {line!r} instead of how it stands")
    return answer


def _failed(problem: str) -> dict[str, Any]:
    return {"setting": "peers", "problem": problem}


def _let_go(agent: subprocess.Popen[str]) -> None:
    """End it, if it has not ended, and its pipes."""
    assert agent.stdin is not None and agent.stdout is not None
    with suppress(BrokenPipeError):
        agent.stdin.close()
    try:
        agent.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        agent.kill()
        agent.wait()
    agent.stdout.close()
