"""From which pages of others a page can be put together.

A *cover* of a rank's rectangle is a set of other forms whose rectangles fill it: the two halves that a
tensor-parallel pair stored, the whole that a single rank stored, the stages of a pipeline; or the same rectangle
in another layout. Which covers there are depends on what kinds of page the store was ever given, not on its
pages; whether a cover has a given page is looked up page by page.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .form import PageForm, Range, Untileable, overlap
from .identity import ModelIdentity
from .kind import Kind

MOST_COVERS = 8  # each costs a lookup of the pages that are missing

Cell = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Piece:
    """A kind of page that others store."""

    namespace: bytes
    form: PageForm


Cover = tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Tiling:
    """What one pool can read of what others stored.

    Attributes:
        covers: fewest pieces first.
        apart: why the pages of other kinds of the same model are of no use, by namespace.
    """

    covers: tuple[Cover, ...] = ()
    apart: dict[bytes, str] = field(default_factory=dict)


NOTHING = Tiling()


def tiling(mine: Kind, others: Iterable[Kind]) -> Tiling:
    """The covers of one kind of page by others of the same model and pool."""
    kin = [
        kind
        for kind in others
        if kind.namespace != mine.namespace
        and (kind.model.name, kind.page.pool) == (mine.model.name, mine.page.pool)
    ]
    apart = {kind.namespace: why for kind in kin if (why := _why_apart(mine, kind))}
    near = [kind for kind in kin if kind.namespace not in apart]
    try:
        form = PageForm.of(mine.page)
    except Untileable as reason:
        return Tiling(apart=apart | {kind.namespace: str(reason) for kind in near})
    pieces = []
    for kind in near:
        try:
            pieces.append(_piece(kind, form))
        except Untileable as reason:
            apart[kind.namespace] = str(reason)
    usable = [piece for piece in pieces if _shares(piece.form, form)]
    return Tiling(_covers(form, usable, apart), apart)


def _piece(kind: Kind, mine: PageForm) -> Piece:
    """Raises: Untileable."""
    form = PageForm.of(kind.page)
    if form.runs != mine.runs:
        raise Untileable(f"rows of {form.runs} bytes, here {mine.runs}")
    return Piece(kind.namespace, form)


def _why_apart(mine: Kind, other: Kind) -> str:
    """Why no part of a page of another kind can be part of one of ours; "" if it could."""
    if mine.model != other.model:
        names = sorted(_differing(mine.model, other.model))
        return f"another {', '.join(names)}"
    for name in ("page_size", "dtype", "head_dims", "total_heads", "slices", "shape"):
        ours, theirs = getattr(mine.page, name), getattr(other.page, name)
        if ours != theirs:
            return f"{name} {theirs}, here {ours}"
    return ""


def _differing(one: ModelIdentity, other: ModelIdentity) -> set[str]:
    names = {
        name
        for name in set(one.settings) | set(other.settings)
        if one.settings.get(name) != other.settings.get(name)
    }
    if one.fingerprint != other.fingerprint:
        names.add("fingerprint of the weights")
    if one.kv_dtype != other.kv_dtype:
        names.add("kv_cache_dtype")
    return names


def _covers(mine: PageForm, pieces: Sequence[Piece], apart: dict[bytes, str]) -> tuple[Cover, ...]:
    grid = _Grid(mine, [piece.form for piece in pieces])
    found: dict[frozenset[bytes], Cover] = {}
    for seed in pieces:
        cover, left = _cover(seed, pieces, grid)
        if left:
            apart[seed.namespace] = f"of its topology only {_rectangles(cover)} was ever stored"
        else:
            found.setdefault(frozenset(piece.namespace for piece in cover), cover)
    for piece in (piece for cover in found.values() for piece in cover):
        apart.pop(piece.namespace, None)
    return tuple(sorted(found.values(), key=len)[:MOST_COVERS])


def _cover(seed: Piece, pieces: Sequence[Piece], grid: _Grid) -> tuple[Cover, set[Cell]]:
    """The seed and what fills the rest, of its own kind first; and what nothing fills."""
    cover, left = [seed], grid.whole - grid.cells(seed.form)

    def likeness(piece: Piece) -> tuple[bool, int]:
        form = piece.form
        same = form.layout == seed.form.layout and _width(form.heads) == _width(seed.form.heads)
        return same, len(grid.cells(form))

    for piece in sorted(pieces, key=likeness, reverse=True):
        if gained := left & grid.cells(piece.form):
            cover.append(piece)
            left -= gained
    return tuple(cover), left


class _Grid:
    """A rectangle, cut wherever that of any of the others begins or ends."""

    def __init__(self, mine: PageForm, others: Iterable[PageForm]) -> None:
        forms = [mine, *others]
        self._layers = sorted({at for form in forms for at in form.layers})
        self._heads = sorted({at for form in forms for at in form.heads})
        self.whole = self._of(mine)

    def cells(self, form: PageForm) -> set[Cell]:
        """Those of the whole that a form fills."""
        return self._of(form) & self.whole

    def _of(self, form: PageForm) -> set[Cell]:
        return {
            (layer, head)
            for layer in self._layers
            if form.layers[0] <= layer < form.layers[1]
            for head in self._heads
            if form.heads[0] <= head < form.heads[1]
        }


def _shares(one: PageForm, other: PageForm) -> bool:
    layers, heads = overlap(one.layers, other.layers), overlap(one.heads, other.heads)
    return layers[0] < layers[1] and heads[0] < heads[1]


def _width(span: Range) -> int:
    return span[1] - span[0]


def _rectangles(cover: Cover) -> str:
    return ", ".join(
        f"layers {piece.form.layers[0]}-{piece.form.layers[1] - 1} of heads "
        f"{piece.form.heads[0]}-{piece.form.heads[1] - 1}"
        for piece in cover
    )
