"""The launcher of SGLang's server, driven against a small server that fails on request."""

from __future__ import annotations

import http.server
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmcache_sglang.testing.server import ServerFailed, ServerRefused, SGLangServer

# Stands for the interpreter: takes SGLang's command line, serves /health, /generate and an error.
FAKE_PYTHON = """#!{python}
import http.server, json, os, signal, socket, subprocess, sys
mode = os.environ.get("FAKE_MODE", "")
print("starting with", sys.argv[1:], flush=True)
if mode == "dies":
    sys.exit(3)
if mode == "taken":
    first = not os.path.exists("{folder}/started")
    open("{folder}/started", "w").close()
    if first:  # as uvicorn says it under SGLang, whose process then stays
        print("[Errno 98] error while attempting to bind: Address already in use", flush=True)
        signal.pause()
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mode == "parent":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("child", child.pid, flush=True)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(503 if mode == "never" else 200, b"", "text/plain")

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200 if self.path == "/generate" else 400, body, "application/json")

    def answer(self, status, body, kind):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass

port = int(sys.argv[sys.argv.index("--port") + 1])
if mode == "late" and socket.socket().connect_ex(("127.0.0.1", port)) == 0:
    signal.pause()  # another answers there, and this one still imports
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class Fake(SGLangServer):
    def __init__(self, folder: Path, mode: str = "") -> None:
        python = folder / "python"
        python.write_text(FAKE_PYTHON.format(python=sys.executable, folder=folder))
        python.chmod(0o755)
        super().__init__(
            "a-model",
            args=["--page-size", "16"],
            env={"FAKE_MODE": mode},
            log_path=folder / "logs" / "server.log",
            python=str(python),
        )


class _Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Fake]:
    with Fake(tmp_path) as server:
        yield server


def test_it_answers_and_is_gone_after_the_block(tmp_path: Path) -> None:
    with Fake(tmp_path) as server:
        assert server.get("/health") == ""
        assert "'-m', 'sglang.launch_server', '--model-path', 'a-model'" in server.log
        assert "'--page-size', '16'" in server.log
        pid = server.pid
    assert _gone(pid)


def test_text_and_token_ids_are_asked_for_at_temperature_0(server: Fake) -> None:
    params = {"temperature": 0, "max_new_tokens": 4}
    assert server.generate("hi", 4) == {"text": "hi", "sampling_params": params}
    assert server.generate((1, 2), 4, ignore_eos=True) == {
        "input_ids": [1, 2],
        "sampling_params": params | {"ignore_eos": True},
    }


def test_a_refusal_carries_the_body(server: Fake) -> None:
    with pytest.raises(ServerRefused, match=r"POST /nowhere: HTTP 400: .*why") as refusal:
        server.post("/nowhere", {"why": "not"})
    assert refusal.value.status == 400


def test_a_death_at_the_start_is_reported_with_the_log(tmp_path: Path) -> None:
    with pytest.raises(ServerFailed, match=r"status 3[^\0]*starting with"):
        Fake(tmp_path, "dies").start()


def test_a_server_that_is_never_ready_is_ended(tmp_path: Path) -> None:
    server, waits = Fake(tmp_path, "never"), list[float]()
    with pytest.raises(ServerFailed, match="not ready after 1 s"):
        server.start(timeout=1.0, on_wait=waits.append)
    assert waits == sorted(waits)
    assert len(waits) > 1
    assert _gone(server.pid)


def test_a_port_that_was_taken_meanwhile_is_changed_for_another(tmp_path: Path) -> None:
    server = Fake(tmp_path, "taken")
    first = server.port
    with server:
        assert server.port != first
        assert server.get("/health") == ""


def test_another_server_that_answers_at_the_port_is_not_taken_for_ours(tmp_path: Path) -> None:
    server = Fake(tmp_path, "late")
    with http.server.ThreadingHTTPServer(("127.0.0.1", server.port), _Healthy) as other:
        threading.Thread(target=other.serve_forever).start()
        try:
            with server:
                assert server.port != other.server_port
                assert server.generate("hi", 4)["text"] == "hi"
        finally:
            other.shutdown()


def test_what_ignores_the_request_to_end_is_killed(tmp_path: Path) -> None:
    server = Fake(tmp_path, "stubborn")
    server.start()
    begun = time.monotonic()
    server.stop(timeout=0.5)
    assert 0.5 <= time.monotonic() - begun < 10
    assert _gone(server.pid)


def test_a_kill_takes_the_children_along(tmp_path: Path) -> None:
    server = Fake(tmp_path, "parent")
    server.start()
    child = int(server.log.split("child ")[1].split()[0])
    server.kill()
    assert _gone(server.pid)
    assert _gone(child)
    server.stop()  # after the end there is nothing to do


def test_one_object_is_one_life(server: Fake) -> None:
    with pytest.raises(ServerFailed, match="started before"):
        server.start()


def _gone(pid: int) -> bool:
    """An orphan that was killed may be left for process 1 to reap: it runs no more."""
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"
