"""What is asked: questions on one document, and a chat about another.

Each text is the shared prefix of its requests. The first request on a text is the one that has
nothing to share on a cold server, and the store to thank on a warm one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.demo.client import Message

TEXTS = Path(__file__).with_name("texts")
MOST_TOKENS = 5000


@dataclass(frozen=True, slots=True)
class Script:
    """Questions about one text. In a chat each request carries all turns before it."""

    name: str
    text: str
    questions: tuple[str, ...]
    is_chat: bool

    def messages(self, turn: int, answers: Sequence[str]) -> list[Message]:
        """The request for question `turn`; `answers` holds at least those of the turns before."""
        if not self.is_chat:
            return [_user(_opening(self.text, self.questions[turn]))]
        messages = [_user(_opening(self.text, self.questions[0]))]
        for answer, question in zip(answers[:turn], self.questions[1 : turn + 1], strict=True):
            messages.append({"role": "assistant", "content": answer})
            messages.append(_user(f"Question: {question}"))
        return messages


def scripts(shorten: Callable[[str], str]) -> tuple[Script, ...]:
    """The demo's two; `shorten` cuts a text to what the model takes.

    The questions are ones that Gemma answers with a clear lead of each word over the next best: two
    servers need not round alike, and a tie would say nothing about the cache.
    """
    return (
        Script(
            name="document",
            text=shorten(_read("constitution.txt")),
            questions=(
                "Where do bills for raising revenue originate?",
                "Who shall be Commander in Chief?",
                "How often shall Congress assemble?",
            ),
            is_chat=False,
        ),
        Script(
            name="chat",
            text=shorten(_read("declaration.txt")),
            questions=(
                "What are all men created?",
                "What are their unalienable rights?",
                "Which king is accused?",
            ),
            is_chat=True,
        ),
    )


def warm_up(server: str) -> list[Message]:
    """A request unlike all others, on each server: what a first request costs is not measured."""
    counted = " ".join(map(str, range(150)))
    return [_user(f"The {server} server warms up by counting: {counted}")]


def shortener(model: Path) -> Callable[[str], str]:
    """Cuts texts to what this model's tokenizer and context leave room for."""
    count = _counter(model)
    limit = _limit(model)
    return lambda text: shortened(text, count, limit)


def shortened(text: str, count: Callable[[str], int], limit: int) -> str:
    """The text, or as many of its first paragraphs as stay within `limit` tokens."""
    if count(text) <= limit:
        return text
    kept = ""
    for paragraph in text.split("\n\n"):
        longer = f"{kept}\n\n{paragraph}" if kept else paragraph
        if count(longer) > limit:
            break
        kept = longer
    return kept


def _limit(model: Path) -> int:
    """Three quarters of the context at most: the questions and answers need room too."""
    path = model / "config.json"
    config: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    text_config = config.get("text_config", config)
    context: int = text_config.get("max_position_embeddings", 2 * MOST_TOKENS)
    return min(MOST_TOKENS, context * 3 // 4)


def _counter(model: Path) -> Callable[[str], int]:
    """By the model's own tokenizer where it is one file, else by the usual length of a token."""
    path = model / "tokenizer.json"
    if not path.exists():
        return lambda text: len(text) // 4
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    return lambda text: len(tokenizer.encode(text).ids)


def _opening(text: str, question: str) -> str:
    return f"{text}\n\nQuestion: {question}"


def _read(name: str) -> str:
    return (TEXTS / name).read_text(encoding="utf-8").strip()


def _user(content: str) -> Message:
    return {"role": "user", "content": content}
