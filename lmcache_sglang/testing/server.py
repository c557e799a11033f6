"""A real SGLang (or vLLM) HTTP server in a process group of its own, started, asked and stopped by a test.

    with SGLangServer(model, args=["--device", "cpu"], log_path=folder / "server.log") as server:
        answer = server.generate("the quick brown", 8)

The server's output goes to the log and nowhere else. Whatever happens in the block, nothing of the
group outlives it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

Entry = Literal["launch_server", "serve", "vllm"]

POLL_SECONDS = 0.1
TAIL_LINES = 40
ANSWER_SECONDS = 300.0
ATTEMPTS = 3  # at a port of our own choice
PORT_TAKEN = "address already in use"
_LISTEN = "0A"
PORTS = range(20_000, 30_000)  # below those that the kernel hands out unasked


class ServerFailed(RuntimeError):
    """The server died, or was not ready in time; the message ends with its last log lines."""


class _PortTaken(ServerFailed):
    """Between the choice of a port and its use, another process took it."""


class ServerRefused(RuntimeError):
    """The server answered with an HTTP error; the message carries its body."""

    def __init__(self, method: str, path: str, status: int, body: str) -> None:
        super().__init__(f"{method} {path}: HTTP {status}: {body}")
        self.status = status
        self.body = body


class SGLangServer:
    """One server, and one life: make another object to start again.

    `env` is laid over the caller's environment. `python` names the interpreter whose SGLang runs.
    The log is begun afresh by `start`. `api_key` is sent as a bearer token with every request.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        log_path: Path,
        python: str = sys.executable,
        entry: Entry = "launch_server",
        host: str = "127.0.0.1",
        port: int | None = None,
        api_key: str | None = None,
    ) -> None:
        self.host = host
        self.port = port or free_port(host)
        self._attempts = ATTEMPTS if port is None else 1
        self.log_path = log_path
        self._env = dict(env or {})
        self._api_key = api_key
        model = "--model" if entry == "vllm" else "--model-path"
        where = [model, str(model_path), "--host", host]
        self._command = [*_command(entry, python), *where, *args]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        """Of the server's first process, which is also the id of its process group."""
        if self._process is None:
            raise ServerFailed("the server was not started")
        return self._process.pid

    @property
    def log(self) -> str:
        """All that the server has written so far."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def start(self, timeout: float = 180.0, on_wait: Callable[[float], None] | None = None) -> None:
        """Return once /health answers; raise `ServerFailed`, with nothing left running, otherwise.

        `on_wait` is called at each poll with the seconds waited so far.
        """
        if self._process is not None:
            raise ServerFailed("the server was started before")
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, self._attempts + 1):
            try:
                self._start(timeout, on_wait)
            except _PortTaken:
                if attempt == self._attempts:
                    raise
                self.port = free_port(self.host)
            else:
                return

    def _variables(self) -> list[str]:
        """Put before the command, so that the rest of the environment is inherited unread."""
        return ["env", *(f"{name}={value}" for name, value in self._env.items())]

    def _start(self, timeout: float, on_wait: Callable[[float], None] | None) -> None:
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [*self._variables(), *self._command, "--port", str(self.port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._await_health(self._process, timeout, on_wait)
        except BaseException:  # also an interrupt: a server nobody waits for must not stay
            self.kill()
            raise

    def stop(self, timeout: float = 60.0) -> None:
        """Ask the server to end and return when its whole group is gone; kill what stays too long.

        Only the first process is asked: SGLang ends its own children in order, and that order is
        what a store sees as a clean shutdown.
        """
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        if not self._await_end(timeout):
            self.kill()

    def kill(self) -> None:
        """End the whole group at once, as a crash would, and return when it is gone."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):  # the group is gone already
            os.killpg(self.pid, signal.SIGKILL)
        if not self._await_end(timeout=30.0):
            raise ServerFailed(f"process group {self.pid} survives SIGKILL")

    def get(self, path: str) -> Any:
        return self._ask("GET", path)

    def post(self, path: str, body: object = None, timeout: float = ANSWER_SECONDS) -> Any:
        return self._ask("POST", path, body, timeout)

    def put(self, path: str, body: object = None) -> Any:
        return self._ask("PUT", path, body)

    def delete(self, path: str) -> Any:
        return self._ask("DELETE", path)

    def generate(
        self, prompt: str | Sequence[int], max_new_tokens: int, **sampling: Any
    ) -> dict[str, Any]:
        """The answer to text, or to token ids, at temperature 0 unless `sampling` says otherwise."""
        key, value = ("text", prompt) if isinstance(prompt, str) else ("input_ids", list(prompt))
        params = {"temperature": 0, "max_new_tokens": max_new_tokens} | sampling
        answer: dict[str, Any] = self.post("/generate", {key: value, "sampling_params": params})
        return answer

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[Any]:
        """The answer to a POST as it comes: the payload of each server-sent event, parsed."""
        request = self._request("POST", path, {**body, "stream": True})
        with _OPENER.open(request, timeout=ANSWER_SECONDS) as answer:
            for line in answer:
                data = line.decode().strip().removeprefix("data: ")
                if data and data != "[DONE]":
                    yield json.loads(data)

    def _request(self, method: str, path: str, body: object) -> urllib.request.Request:
        request = urllib.request.Request(self.url + path, method=method)
        if self._api_key is not None:
            request.add_header("Authorization", f"Bearer {self._api_key}")
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        return request

    def _ask(
        self, method: str, path: str, body: object = None, timeout: float = ANSWER_SECONDS
    ) -> Any:
        """The answer, parsed where it is JSON; an HTTP error becomes `ServerRefused`."""
        request = self._request(method, path, body)
        try:
            with _OPENER.open(request, timeout=timeout) as answer:
                return _parsed(answer.read().decode(), answer.headers.get_content_type())
        except urllib.error.HTTPError as error:
            with error:
                text = error.read().decode(errors="replace")
            raise ServerRefused(method, path, error.code, text) from error

    def _await_health(
        self,
        process: subprocess.Popen[bytes],
        timeout: float,
        on_wait: Callable[[float], None] | None,
    ) -> None:
        begun = time.monotonic()
        while not (self._healthy() and self._listens()):
            waited = time.monotonic() - begun
            if PORT_TAKEN in self.log.lower():  # SGLang's first process stays, and serves nothing
                raise _PortTaken(str(self._failure("another process took one of its ports")))
            if process.poll() is not None:
                raise self._failure(f"the server ended with status {process.returncode}")
            if waited > timeout:
                raise self._failure(f"the server was not ready after {timeout:.0f} s")
            if on_wait is not None:
                on_wait(waited)
            time.sleep(POLL_SECONDS)

    def _healthy(self) -> bool:
        try:
            self._ask("GET", "/health", timeout=5.0)
        except (OSError, ServerRefused):  # not listening yet, or listening and still loading
            return False
        return True

    def _listens(self) -> bool:
        """Whether it was this server that answered; another may have taken the port before it did."""
        heard = {inode for port, inode in _listening() if port == self.port}
        ours = any(heard & _sockets(pid) for pid, state in _members(self.pid) if state != "Z")
        if heard and not ours:
            raise _PortTaken(str(self._failure(f"another process answers at {self.url}")))
        return ours

    def _await_end(self, timeout: float) -> bool:
        """Whether the group is gone within `timeout`."""
        assert self._process is not None
        deadline = time.monotonic() + timeout
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        while _group_lives(self.pid):  # grandchildren: not ours to wait for, only to watch
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS / 10)
        return True

    def _failure(self, what: str) -> ServerFailed:
        tail = "\n".join(self.log.splitlines()[-TAIL_LINES:])
        return ServerFailed(f"{what}; {self.log_path} ends:\n{tail}")


def free_port(host: str = "127.0.0.1") -> int:
    """A port nobody listens on now; another process may still take it before the caller does."""
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):  # Hypothesis seeds the other one
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
    raise ServerFailed(f"{host} has no free port in {PORTS}")


# Without the proxies of the environment: the server is on this machine.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _command(entry: Entry, python: str) -> list[str]:
    if entry == "launch_server":
        return [python, "-m", "sglang.launch_server"]
    if entry == "vllm":
        return [python, "-m", "vllm.entrypoints.openai.api_server"]
    script = Path(python).with_name("sglang")
    if script.exists():
        return [str(script), "serve"]
    # An environment that only sees another one's packages has no script of its own.
    return [python, "-c", "from sglang.cli.main import main; main()", "serve"]


def _parsed(text: str, content_type: str) -> Any:
    return json.loads(text) if content_type == "application/json" and text else text


def _group_lives(group: int) -> bool:
    """Whether a process of the group still runs; one that only waits to be reaped does not.

    Orphans are for process 1 to reap, and in a container that may take long or never happen.
    """
    return any(state != "Z" for _, state in _members(group))


def _members(group: int) -> Iterator[tuple[int, str]]:
    """The id and the state of each process of a group."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except (FileNotFoundError, ProcessLookupError):  # it ended between the two looks
            continue
        state, _, process_group = text.rpartition(")")[2].split()[:3]
        if int(process_group) == group:
            yield int(stat.parent.name), state


def _listening() -> Iterator[tuple[int, str]]:
    """The port and the inode of each TCP socket that listens here (proc(5), /proc/net/tcp)."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:] if Path(table).exists() else ():
            fields = line.split()
            if fields[3] == _LISTEN:
                yield int(fields[1].rpartition(":")[2], 16), fields[9]


def _sockets(pid: int) -> set[str]:
    """The inodes of a process's open sockets; none where it ended."""
    found = set()
    # Of one that waits to be reaped only root may look.
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed between the two looks
                found.add(link.readlink().name.removeprefix("socket:[").removesuffix("]"))
    return found
