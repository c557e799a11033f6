"""The same requests to a server that knows nothing and to its successor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.demo.client import ChatClient, Reply
from examples.demo.progress import Progress
from examples.demo.server import Serves, restorable
from examples.demo.workload import Script, warm_up

WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Round:
    """What one server answered: by script, its replies in the order of the questions."""

    replies: Mapping[str, Sequence[Reply]]

    def answers(self, script: Script) -> list[str]:
        return [reply.text for reply in self.replies[script.name]]


@dataclass(frozen=True, slots=True)
class Player:
    """Plays a workload to one server after another."""

    setup: Serves
    scripts: Sequence[Script]
    max_tokens: int
    start_timeout: float
    logs: Path
    progress: Progress

    def play(self, name: str, earlier: Round | None = None) -> Round:
        """One server's whole life. When this returns, all it computed is stored and it is gone.

        The chats of `earlier` are replayed word for word, so that both servers see one prompt.
        """
        server = self.setup.server(self.logs / f"{name}.log")
        try:
            with self.progress.stage(f"{name} server: starting"):
                server.start(timeout=self.start_timeout)
            client = self.setup.client(server)
            with self.progress.stage(f"{name} server: warm-up request"):
                client.ask(warm_up(name), WARM_UP_TOKENS)
            played = self._ask_all(client, name, earlier)
            if earlier is None:
                with self.progress.stage(f"{name} server: storing") as stage:
                    if not self.setup.await_stored(server, _least_stored(played)):
                        stage.note = "not all of it was reported stored"
        except BaseException:  # also an interrupt: nobody is left to wait for an orderly end
            server.kill()
            raise
        # SIGTERM, and a wait until the process is gone: the backend writes what it still holds.
        with self.progress.stage(f"{name} server: stopping"):
            server.stop()
        return played

    def _ask_all(self, client: ChatClient, name: str, earlier: Round | None) -> Round:
        replies: dict[str, list[Reply]] = {}
        for script in self.scripts:
            said = replies[script.name] = []
            for turn, question in enumerate(script.questions):
                history = earlier.answers(script) if earlier else [reply.text for reply in said]
                with self.progress.stage(f"{name} server: {question}") as stage:
                    reply = client.ask(script.messages(turn, history), self.max_tokens)
                    stage.note = " ".join(reply.text.split())
                said.append(reply)
        return Round(replies)


def _least_stored(played: Round) -> int:
    """The whole pages of each text's first request; what later requests add is the drain's."""
    return sum(restorable(replies[0].prompt_tokens) for replies in played.replies.values())
