"""A kind of page that a store was given: what its namespace stands for."""

from __future__ import annotations

from dataclasses import dataclass

from .identity import ModelIdentity, PageIdentity


@dataclass(frozen=True, slots=True)
class Kind:
    """Attributes: namespace: the digest of the other two (identity.py)."""

    namespace: bytes
    model: ModelIdentity
    page: PageIdentity
