"""Whether a GPU copies right what is not a batch of whole pages: single tokens, some layers, a layer at a time, and
vLLM's blocks in each of their orders. As in gpu_copies.py, nothing here asks for a GPU by itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

from benchmarks import gpu_copies
from benchmarks.gpu_copies import Checked, Machine, copies_pages
from lmcache_sglang.kernels.copy_plan import CopyPlan
from lmcache_sglang.kernels.cuda.choice import Way
from lmcache_sglang.testing.torch_pools import (
    BLOCK_ORDERS,
    KINDS,
    Pool,
    PoolShape,
    copy_by_torch,
)

# Long enough that later layers are still under way when the first one is there.
BY_LAYER = {
    "short runs": PoolShape(layers=12, pages=64, page_size=16, heads=4, dims=(64, 64)),
    "long runs": PoolShape(layers=8, pages=16, page_size=64, heads=8, dims=(128, 128)),
}


def check_tokens(machine: Machine, say: Callable[[str], None]) -> list[Checked]:
    """Single tokens from anywhere to anywhere, some of them twice, of a part of the layers."""
    done = []
    for name, shape in gpu_copies.SHAPES.items():
        for direction, source, target in machine.directions():
            checked = Checked(f"tokens of {name}, {direction}")
            for a, b in product(KINDS, KINDS):
                if shape.has(a) and shape.has(b):
                    src, dst = source.pool(a, shape, 1), target.pool(b, shape)
                    for layers, way in product(_ranges(shape.layers), Way):
                        what = f"{a} to {b} by {way.value}, layers {layers.start} to {layers.stop}"
                        checked.add(what, _copies_tokens(machine, src, dst, layers, way))
            say(checked.line())
            done.append(checked)
    return done


def _ranges(layers: int) -> list[range]:
    return [range(layers)] if layers == 1 else [range(layers), range(1, layers), range(1)]


def _copies_tokens(machine: Machine, src: Pool, dst: Pool, layers: range, way: Way) -> bool:
    slots = src.shape.pages * src.shape.page_size
    chosen = random.Random(layers.start)
    come_from = [chosen.randrange(slots) for _ in range(slots // 2)]
    go_to = chosen.sample(range(slots), slots // 2)
    src.fill(1)
    dst.fill(2)
    wanted = dst.twin()
    for plane, layer in product(range(src.planes), layers):
        rows = src.rows(plane, layer)[_places(src, come_from)]
        wanted.rows(plane, layer)[_places(dst, go_to)] = rows.to(dst.flats[0].device)
    machine.finish()  # what fills is not behind the copy's stream
    machine.mover.copy(CopyPlan(come_from, go_to, 1, layers), src.layout, dst.layout, way=way)
    machine.finish()
    return dst.same(wanted)


def _places(pool: Pool, slots: Sequence[int]) -> tuple[list[int], list[int]]:
    size = pool.shape.page_size
    return [slot // size for slot in slots], [slot % size for slot in slots]


def check_registered(machine: Machine, say: Callable[[str], None]) -> list[Checked]:
    """Records in memory that was pinned where it lay, as a tier's is. Before that it is refused, or copied right."""
    checked = Checked("records in registered memory")
    shape = PoolShape(pages=64)
    for way in Way:
        records = Pool("records", shape)
        gpu, again = (machine.gpu.pool("device", shape) for _ in range(2))
        checked.add(f"unpinned, {way.value}", _is_refused_or_right(machine, records, gpu, way))
        with machine.registered(records.memory()):
            for src, dst in [(gpu, records), (records, again)]:
                what = f"{src.kind} to {dst.kind}, {way.value}"
                checked.add(what, copies_pages(machine, src, dst, way))
    say(checked.line())
    return [checked]


def _is_refused_or_right(machine: Machine, src: Pool, dst: Pool, way: Way) -> bool:
    """Some GPUs read memory that is not pinned."""
    try:
        return copies_pages(machine, src, dst, way)
    except ValueError as error:
        return str(error).startswith("memory: ")


def check_by_layer(machine: Machine, say: Callable[[str], None]) -> list[Checked]:
    """A layer at a time: each is there behind its own event, read while later ones may be under way."""
    done = []
    for name, shape in BY_LAYER.items():
        for direction, source, target in machine.directions():
            checked = Checked(f"a layer at a time, {name}, {direction}")
            for a, b in [("page_first", "device"), ("records", "blocks"), ("device", "page_head")]:
                src, dst = source.pool(a, shape), target.pool(b, shape)
                checked.add(f"{a} to {b}", _copies_by_layer(machine, src, dst))
            src, dst = (place.pool("page_first_direct", shape) for place in (source, target))
            checked.add("page_first_direct on both sides", _copies_by_layer(machine, src, dst))
            say(checked.line())
            done.append(checked)
    return done


def _copies_by_layer(machine: Machine, src: Pool, dst: Pool) -> bool:
    pages = list(range(src.shape.pages))
    order = random.Random(2).sample(pages, len(pages))
    src.fill(1)
    dst.fill(2)
    wanted = dst.twin()
    copy_by_torch(src, wanted, pages, order, range(src.shape.layers))
    machine.finish()
    plan = CopyPlan.of_pages(pages, order, page_size=src.shape.page_size)
    events = machine.mover.copy_by_layer(plan, src.layout, dst.layout)
    seen = [
        machine.read_behind(event, [dst.rows(plane, layer) for plane in range(dst.planes)])
        for layer, event in enumerate(events)
    ]
    machine.finish()
    return dst.same(wanted) and all(
        _equal(rows, wanted.rows(plane, layer))
        for layer, planes in enumerate(seen)
        for plane, rows in enumerate(planes)
    )


def _equal(some: Tensor, other: Tensor) -> bool:
    return torch.equal(*(each.cpu().contiguous().view(torch.uint8) for each in (some, other)))


def check_orders(machine: Machine, say: Callable[[str], None]) -> list[Checked]:
    """vLLM's blocks: all layers in one allocation, in each of its orders, there and back."""
    done = []
    for name, shape in gpu_copies.SHAPES.items():
        checked = Checked(f"vLLM's orders, {name}")
        for order, (direction, source, target) in product(BLOCK_ORDERS, machine.directions()):
            for way in Way:
                pool, blocks = source.pool("device", shape), target.pool(order, shape)
                what = f"{order}, {direction}, {way.value}"
                checked.add(what, copies_pages(machine, pool, blocks, way))
                checked.add(f"{what}, and back", copies_pages(machine, blocks, pool, way))
        say(checked.line())
        done.append(checked)
    return done
