"""What is asked: questions about two documents, and one about a third for when the prefill engine is gone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from examples.demo.workload import scripts


@dataclass(frozen=True, slots=True)
class Question:
    """Attributes: is_first: about its document: no engine can have any of it cached."""

    name: str
    prompt: str
    is_first: bool


@dataclass(frozen=True, slots=True)
class Workload:
    questions: tuple[Question, ...]
    alone: Question  # to be asked when there is no prefill engine any more


def workload(shorten: Callable[[str], str]) -> Workload:
    """Args: shorten: cuts a text to what the model takes."""
    asked = tuple(
        Question(f"{script.name} {turn + 1}", _prompt(script.text, question), turn == 0)
        for script in scripts(shorten)
        for turn, question in enumerate(script.questions[:2])
    )
    last = scripts(shorten)[-1]
    backwards = "\n\n".join(reversed(last.text.split("\n\n")))
    return Workload(asked, Question("backwards", _prompt(backwards, last.questions[0]), True))


def _prompt(text: str, question: str) -> str:
    return f"{text}\n\nQuestion: {question}\nAnswer:"
