"""Which pages the lower tier gets, and when: flash wears, and not every prompt comes back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from .base import Below

Mode = Literal["write-through", "write-back"]


class Admission(ABC):
    """Decides for a batch, one run of a chain.

    Attributes:
        holds_back: there are pages that the lower tier gets only if more happens than that time passes.
    """

    holds_back = True

    @abstractmethod
    def below(self, position: int, pages: int) -> Below:
        """What the lower tier is to get of a batch.

        Args:
            position: of its first page in the chain; 0 when it is not known.
            pages: how many it has.
        """


@dataclass(frozen=True, slots=True)
class All(Admission):
    """Every page: in the background at once, or when it would go from the upper tier."""

    mode: Mode = "write-through"
    holds_back = False

    def below(self, position: int, pages: int) -> Below:
        return Below.NOW if self.mode == "write-through" else Below.ON_EVICT


@dataclass(frozen=True, slots=True)
class SecondTouch(Admission):
    """A page that was used, or put again, since it came."""

    def below(self, position: int, pages: int) -> Below:
        return Below.ON_TOUCH


@dataclass(frozen=True, slots=True)
class MinimumPrefix(Admission):
    """The pages of chains of at least so many pages; what comes before them in the chain then follows.

    Args:
        pages: of the shortest chain that is written.
        then: what decides about those.
    """

    pages: int
    then: Admission

    def below(self, position: int, pages: int) -> Below:
        if position + pages >= self.pages:
            return self.then.below(position, pages)
        return Below.LATER
