"""The CUDA copier on the driver of driver.cpp, in a process of its own: `session.py CHECK CUBINS`.

`LD_LIBRARY_PATH` names the folder of that driver. Launches run by the emulation of csrc/emulate.hpp.
"""

from __future__ import annotations

import ctypes
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from lmcache_sglang.errors import CudaError, CudaUnavailableError
from lmcache_sglang.hicache.device_copiers import ByCuda, ByTorch
from lmcache_sglang.hicache.device_pages import DevicePages, MakesCopier, Run
from lmcache_sglang.kernels import _native
from lmcache_sglang.kernels.copy_plan import Convert, CopyPlan
from lmcache_sglang.kernels.cuda.choice import Way
from lmcache_sglang.kernels.cuda.compilers import Nvcc, Nvrtc
from lmcache_sglang.kernels.cuda.copier import CudaCopier, Stream
from lmcache_sglang.kernels.cuda.cubins import Cubins
from lmcache_sglang.kernels.cuda.driver import Gpu
from lmcache_sglang.kernels.cuda.staging import Area
from lmcache_sglang.kernels.layout import PageLayout
from lmcache_sglang.testing.torch_pools import (
    KINDS,
    Pool,
    PoolShape,
    copy_by_torch,
    dequantize_by_torch,
    quantize_by_torch,
    scales_shape,
)

HOST, DEVICE = 1, 2
PAGES = [4, 0, 2], [1, 3, 2]
SHAPE = PoolShape()
CUBINS = Path(sys.argv[2])

fake = ctypes.CDLL("libcuda.so.1")
fake.fake_register.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int]
workers = _native.Workers(1)


@dataclass(frozen=True)
class OneStream:
    cuda_stream: int = 7


class Event:
    """Passed once `Session.run` has run."""

    def __init__(self, session: Session) -> None:
        self.done = False
        self._session = session

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self._session.waits += 1
        self._session.run()


class Session:
    """The memory that the fake knows, and what it was asked."""

    def __init__(self, cubins: Path = CUBINS) -> None:
        self.stream = OneStream()
        self.pools: list[Pool] = []
        self.ranges: list[tuple[int, int]] = []  # that launches may reach beside them
        self.events: list[Event] = []
        self.kernels: list[str] = []
        self.areas: list[Area] = []
        self.waits = 0  # for the GPU
        kind = ctypes.CFUNCTYPE(
            None, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
        )
        self._callback = kind(self._launch)
        fake.fake_on_launch(self._callback)
        self.copier = CudaCopier(0, cubins=cubins, memory=self)

    def pool(self, kind: str, where: int, shape: PoolShape = SHAPE, fill: int = 1) -> Pool:
        made = Pool(kind, shape)
        made.fill(fill)
        for address, size in made.memory():
            fake.fake_register(address, size, where)
        self.pools.append(made)
        return made

    def run(self) -> None:
        fake.fake_run()
        for event in self.events:
            event.done = True

    # What the copier asks of torch.

    def area(self, size: int, stream: Stream) -> Area:
        host, device = ctypes.create_string_buffer(size), ctypes.create_string_buffer(size)
        at = ctypes.addressof(host), ctypes.addressof(device)
        fake.fake_register(at[0], size, HOST)
        fake.fake_register(at[1], size, DEVICE)
        self.areas.append(Area(*at, size, (host, device)))
        return self.areas[-1]

    def passed(self, stream: Stream) -> Event:
        self.events.append(Event(self))
        return self.events[-1]

    def current_stream(self) -> OneStream:
        return self.stream

    def _launch(self, kernel: bytes, params: int, blocks: int, threads: int) -> None:
        memory = [area for pool in self.pools for area in pool.memory()] + self.ranges
        bytes_of_it = ctypes.string_at(params, 200)
        _, strays = _native.emulate(kernel.decode(), bytes_of_it, blocks, [], memory, workers)
        assert (strays, threads) == (0, _native.THREADS)
        self.kernels.append(kernel.decode())


def plan_of(shape: PoolShape = SHAPE, **more: Any) -> CopyPlan:
    return CopyPlan.of_pages(*PAGES, page_size=shape.page_size, **more)


def check_copy(session: Session, src: Pool, dst: Pool, **how: Any) -> None:
    wanted = dst.twin()
    copy_by_torch(src, wanted, *PAGES, range(src.shape.layers))
    session.copier.copy(plan_of(src.shape), src.layout, dst.layout, **how)
    assert not dst.same(wanted)  # nothing is done before the GPU does it
    session.run()
    assert dst.same(wanted)
    assert fake.fake_depth() == 0


def every_layout_from_and_to_host_memory() -> None:
    session = Session()
    for kind in KINDS:
        host = session.pool(kind, HOST, fill=1)
        device = session.pool("device", DEVICE, fill=2)
        check_copy(session, host, device)
        device.fill(3)
        check_copy(session, device, host)
    assert set(session.kernels) == {"lmcache_copy_16"}
    assert fake.fake_calls(b"launch") == 2 * len(KINDS)


def long_runs_go_to_the_copy_engine() -> None:
    session = Session()
    shape = PoolShape(layers=4, page_size=16, heads=8, dims=(64, 64))
    src = session.pool("page_first_direct", HOST, shape)
    dst = session.pool("page_first_direct", DEVICE, shape, fill=2)
    check_copy(session, src, dst)
    assert (fake.fake_calls(b"batch"), fake.fake_calls(b"launch")) == (1, 0)
    dst.fill(3)
    check_copy(session, src, dst, stream=OneStream(0))  # the legacy stream takes no batch
    assert fake.fake_calls(b"batch") == 1
    assert fake.fake_calls(b"copy") > 1
    dst.fill(4)
    check_copy(session, src, dst, way=Way.KERNEL)
    assert fake.fake_calls(b"launch") == 1


def an_older_driver_gets_single_copies() -> None:
    fake.fake_set_version(12040)
    session = Session()
    src = session.pool("page_first", HOST)
    check_copy(session, src, session.pool("page_first", DEVICE, fill=2), way=Way.ENGINE)
    assert fake.fake_calls(b"batch") == 0
    assert fake.fake_calls(b"copy") == len(PAGES[0]) * 2


def one_launch_and_one_event_a_layer() -> None:
    session = Session()
    src, dst = session.pool("page_first", HOST), session.pool("device", DEVICE, fill=2)
    wanted = dst.twin()
    copy_by_torch(src, wanted, *PAGES, range(SHAPE.layers))
    events = session.copier.copy_by_layer(plan_of(), src.layout, dst.layout)
    assert len(events) == fake.fake_calls(b"launch") == SHAPE.layers
    session.run()
    assert dst.same(wanted)


def eighty_layers_wait_for_nothing() -> None:
    """One table, one small copy of it, one area; twice, with nothing done in between."""
    session = Session()
    shape = PoolShape(layers=80, heads=2)
    src, dst = session.pool("page_first", HOST, shape), session.pool("device", DEVICE, shape)
    for pages in [PAGES, PAGES[::-1]]:
        plan = CopyPlan.of_pages(*pages, page_size=shape.page_size)
        events = session.copier.copy_by_layer(plan, src.layout, dst.layout)
        assert len(events) == shape.layers
    assert (fake.fake_calls(b"launch"), fake.fake_calls(b"copy")) == (2 * shape.layers, 2)
    assert (session.waits, len(session.areas)) == (0, 2)
    wanted = dst.twin()
    copy_by_torch(src, wanted, *PAGES, range(shape.layers))
    copy_by_torch(src, wanted, *PAGES[::-1], range(shape.layers))
    session.run()
    assert dst.same(wanted)


def every_layout_a_layer_at_a_time() -> None:
    """In any order, of a part of the layers; each layer's launches copy that layer and nothing else."""
    session = Session()
    for host_kind, device_kind in product(KINDS, ["device", "blocks", "page_first_direct"]):
        src = session.pool(host_kind, HOST, fill=1)
        dst = session.pool(device_kind, DEVICE, fill=2)
        wanted = dst.twin()
        plan = plan_of(layers=range(1, SHAPE.layers))
        with session.copier.layered(plan, src.layout, dst.layout) as copies:
            for layer in reversed(copies.layers):
                copies.copy(layer)
                session.run()
                copy_by_torch(src, wanted, *PAGES, range(layer, layer + 1))
                assert dst.same(wanted), (host_kind, device_kind, layer)
        session.run()
    assert session.waits == 0
    assert len(session.areas) == 1


def rows_that_are_apart_in_some_layers_only() -> None:
    """K and V of the first layer lie side by side and are one run; of the second they do not, and go apart."""
    session = Session()
    row = 64
    memory = torch.arange(row * 8, dtype=torch.int64).view(torch.uint8).view(8, -1)[:, :row].clone()
    fake.fake_register(memory.data_ptr(), memory.numel(), HOST)
    out = torch.zeros_like(memory)
    fake.fake_register(out.data_ptr(), out.numel(), DEVICE)
    session.ranges += [(each.data_ptr(), each.numel()) for each in (memory, out)]

    def layout(tensor: torch.Tensor, k: list[int], v: list[int]) -> PageLayout:
        planes = [[tensor[i : i + 1].view(1, 1, row) for i in rows] for rows in (k, v)]
        return PageLayout.device_pool(planes, page_size=1)

    src, dst = layout(memory, [0, 2], [1, 5]), layout(out, [4, 0], [5, 7])
    plan = CopyPlan.of_pages([0], [0], page_size=1)
    session.copier.copy_by_layer(plan, src, dst)
    session.run()
    for a, b in [(0, 4), (1, 5), (2, 0), (5, 7)]:
        assert torch.equal(out[b], memory[a])
    assert not out[[1, 2, 3, 6]].any()


def each_layer_has_the_word_that_fits_it() -> None:
    """The first layer is aligned to 16 bytes, the second to 2 only: a GPU faults on longer words there."""
    session = Session()
    memory = torch.arange(512, dtype=torch.int16).view(torch.uint8)
    out = torch.zeros_like(memory)
    for tensor, where in [(memory, HOST), (out, DEVICE)]:
        fake.fake_register(tensor.data_ptr(), tensor.numel(), where)
        session.ranges.append((tensor.data_ptr(), tensor.numel()))
    layouts = [
        PageLayout.device_pool(
            [[tensor[at : at + 64].view(1, 1, 64) for at in (0, 130)]], page_size=1
        )
        for tensor in (memory, out)
    ]
    session.copier.copy_by_layer(CopyPlan([0], [0]), *layouts)
    session.run()
    assert session.kernels == ["lmcache_copy_16", "lmcache_copy_2"]
    assert torch.equal(out[:64], memory[:64])
    assert torch.equal(out[130:194], memory[130:194])


def long_runs_of_a_layer_go_to_the_copy_engine() -> None:
    session = Session()
    shape = PoolShape(layers=4, page_size=16, heads=8, dims=(256, 256))
    src = session.pool("page_first_direct", HOST, shape)
    dst = session.pool("page_first_direct", DEVICE, shape, fill=2)
    wanted = dst.twin()
    copies = session.copier.layered(plan_of(shape), src.layout, dst.layout)
    for layer in copies.layers:
        copies.copy(layer)
        session.run()
        copy_by_torch(src, wanted, *PAGES, range(layer, layer + 1))
        assert dst.same(wanted)
    assert (fake.fake_calls(b"batch"), fake.fake_calls(b"launch")) == (shape.layers, 0)
    assert session.areas == []


def a_layer_at_a_time_converts_too() -> None:
    session = Session()
    shape = PoolShape(dims=(128, 128))
    src = session.pool("device", DEVICE, shape)
    for flat in src.flats:
        flat.copy_(torch.randn(flat.shape))
    small = [session.pool("records", HOST, replace(shape, dtype=torch.uint8)) for _ in range(2)]
    scales = [session.pool("page_first", HOST, scales_shape(shape)) for _ in range(2)]
    plan = plan_of(shape, convert=Convert.BF16_TO_E4M3)
    session.copier.copy(plan, src.layout, small[0].layout, scales=scales[0].layout)
    session.copier.copy_by_layer(plan, src.layout, small[1].layout, scales=scales[1].layout)
    session.run()
    assert small[0].same(small[1])
    assert scales[0].same(scales[1])


def a_copy_that_is_refused_enqueues_no_layer() -> None:
    session = Session()
    src, dst = session.pool("page_first", HOST), session.pool("device", DEVICE)
    layered = partial(session.copier.layered, src=src.layout, dst=dst.layout)
    must_fail(
        lambda: layered(plan_of(layers=range(1, 4))),
        ValueError,
        "layers: range(1, 4) is no range of these 3",
    )
    must_fail(lambda: layered(CopyPlan([0], [20])), IndexError, "dst_slots: 20 is not one of 20")
    with layered(plan_of(layers=range(1, 3))) as copies:
        must_fail(lambda: copies.copy(0), IndexError, "layer: 0 is none of range(1, 3)")
        must_fail(lambda: copies.copy(3), IndexError, "layer: 3 is none of range(1, 3)")
    must_fail(lambda: copies.copy(1), ValueError, "closed")
    copies.close()
    empty = layered(CopyPlan.of_pages([], [], page_size=4))
    empty.copy(2)
    assert fake.fake_calls(b"launch") == 0


def tables_outlive_their_launches() -> None:
    session = Session()
    src = session.pool("page_first", HOST)
    into = [session.pool("device", DEVICE, fill=2 + i) for i in range(20)]
    wanted = [pool.twin() for pool in into]
    for i, pool in enumerate(into):
        pages = [i % 5], [(i + 1) % 5]
        copy_by_torch(src, wanted[i], *pages, range(SHAPE.layers))
        plan = CopyPlan.of_pages(*pages, page_size=SHAPE.page_size)
        session.copier.copy(plan, src.layout, pool.layout)
    assert len(session.areas) == 20
    session.run()
    assert all(pool.same(its) for pool, its in zip(into, wanted, strict=True))
    check_copy(session, src, session.pool("device", DEVICE, fill=2))
    assert len(session.areas) == 20  # now they are taken again


def conversions_there_and_back() -> None:
    session = Session()
    shape = PoolShape(dims=(128, 128))
    eight = replace(shape, dtype=torch.uint8)
    src, again = session.pool("device", DEVICE, shape), session.pool("device", DEVICE, shape)
    for flat in src.flats:
        flat.copy_(torch.randn(flat.shape))
    dst, scales = session.pool("page_first", HOST, eight), Pool("page_first", scales_shape(shape))
    session.pools.append(scales)
    for address, size in scales.memory():
        fake.fake_register(address, size, HOST)
    there = plan_of(shape, convert=Convert.BF16_TO_E4M3)
    session.copier.copy(there, src.layout, dst.layout, scales=scales.layout)
    back = CopyPlan.of_pages(*PAGES[::-1], page_size=4, convert=Convert.E4M3_TO_BF16)
    session.copier.copy(back, dst.layout, again.layout, scales=scales.layout)
    session.run()
    assert session.kernels == ["lmcache_quantize_bf16_8", "lmcache_dequantize_bf16_8"]
    for plane in range(2):
        for layer in range(shape.layers):
            numbers, its_scales = quantize_by_torch(src.rows(plane, layer)[PAGES[0]])
            made = dst.rows(plane, layer)[PAGES[1]].view(torch.float8_e4m3fn)
            assert torch.equal(made.float(), numbers.float())
            rows = again.rows(plane, layer)[PAGES[0]]
            assert torch.equal(rows, dequantize_by_torch(numbers, its_scales, torch.bfloat16))


def memory_that_is_not_pinned_is_refused() -> None:
    session = Session()
    unpinned, device = Pool("page_first", SHAPE), session.pool("device", DEVICE)
    for src, dst in [(unpinned, device), (device, unpinned)]:
        copy = partial(session.copier.copy, plan_of(), src.layout, dst.layout)
        must_fail(copy, ValueError, "pin host memory")
    assert fake.fake_calls(b"launch") == fake.fake_calls(b"copy") == 0
    assert fake.fake_depth() == 0


def records_in(slab: torch.Tensor, pages: int) -> PageLayout:
    """Pages of one token with one run of 16 bytes, each at an address of its own."""
    size = slab.numel() // pages
    at = [slab.data_ptr() + i * size for i in range(pages)]
    return PageLayout.records(at, runs=[16], layers=1, heads=1, page_size=1, itemsize=1, owner=slab)


def device_of(pages: int) -> PageLayout:
    tensor = torch.zeros(pages, 1, 16, dtype=torch.uint8)
    fake.fake_register(tensor.data_ptr(), tensor.numel(), DEVICE)
    return PageLayout.device_pool([[tensor]], page_size=1)


def many_records_of_one_slab_cost_a_few_calls() -> None:
    session = Session()
    slab = torch.zeros(1000 * 32, dtype=torch.uint8)
    fake.fake_register(slab.data_ptr(), slab.numel(), HOST)
    plan = CopyPlan.of_pages(range(1000), range(1000), page_size=1)
    session.copier.copy(plan, records_in(slab, 1000), device_of(1000))
    assert fake.fake_calls(b"pointer") == 2 * 4


def a_hole_between_two_pinned_pieces_is_refused() -> None:
    session = Session()
    slab = torch.zeros(3, 4096, dtype=torch.uint8)
    for piece in (0, 2):
        fake.fake_register(slab[piece].data_ptr(), 4096, HOST)
    whole = PageLayout.device_pool([[slab.view(-1, 1, 16)]], page_size=1)
    copy = partial(session.copier.copy, CopyPlan([0], [0]), dst=device_of(whole.pages))
    must_fail(lambda: copy(src=whole), ValueError, f"does not reach {slab[1].data_ptr():#x}")
    fake.fake_register(slab[1].data_ptr(), 4096, HOST)
    copy(src=PageLayout.device_pool([[slab.view(-1, 1, 16)]], page_size=1))


def a_gpu_that_reads_all_memory_needs_none_of_it_pinned() -> None:
    fake.fake_set_reads_any(1)
    session = Session()
    slab = torch.zeros(3 * 32, dtype=torch.uint8)
    session.copier.copy(CopyPlan([0], [0]), records_in(slab, 3), device_of(3))
    assert fake.fake_calls(b"launch") == 1


def nothing_to_copy_is_nothing_asked() -> None:
    session = Session()
    src, dst = session.pool("page_first", HOST), session.pool("device", DEVICE)
    empty = CopyPlan.of_pages([], [], page_size=4)
    assert session.copier.copy(empty, src.layout, dst.layout) == 0
    assert fake.fake_calls(b"launch") == 0


def what_the_driver_refuses_is_said() -> None:
    must_fail(lambda: Gpu(1), CudaUnavailableError, "GPU 1 cannot be used: cuDeviceGet")
    must_fail(lambda: load(b"no cubin at all"), CudaUnavailableError, "no newer than the driver's")
    gpu = Gpu(0)
    outside = "cuMemcpyAsync: CUDA_ERROR_INVALID_CONTEXT"
    must_fail(lambda: gpu.copy(1, 2, 3, 7), CudaError, outside)
    with gpu.current():
        refused = "cuMemcpyAsync: CUDA_ERROR_INVALID_VALUE (refused by the fake)"
        must_fail(lambda: gpu.copy(1, 2, 3, 7), CudaError, refused)
    assert fake.fake_depth() == 0


def a_cubin_that_the_driver_refuses_is_not_the_last_word() -> None:
    """One of a newer nvcc, and one that lacks a kernel: the next one is taken, NVRTC's at last."""
    folder = CUBINS / "refused"
    shutil.copytree(CUBINS, folder, ignore=lambda *_: ["refused", "lacking", "libcuda.so.1"])
    Cubins(folder).keep("sm_90", "nvcc-99.1", b"no cubin at all")
    Cubins(folder).keep("sm_90", "nvcc-9.1", b"\177ELF" + bytes(60))
    session = Session(folder)
    assert session.copier.built.source.startswith("nvrtc")
    check_copy(session, session.pool("page_first", HOST), session.pool("device", DEVICE, fill=2))


def what_fails_at_the_start_is_given_back() -> None:
    def refuse(*_: object) -> None:
        raise CudaUnavailableError("no compiler")

    Nvrtc.compile = refuse  # type: ignore[assignment, method-assign]
    Nvcc.compile = refuse  # type: ignore[assignment, method-assign]
    folder = CUBINS / "lacking"
    Cubins(folder).keep("sm_90", "nvcc-9.1", b"\177ELF" + bytes(60))
    must_fail(lambda: Session(folder), CudaUnavailableError, "not all kernels are in what nvcc")
    assert (fake.fake_calls(b"unload"), fake.fake_calls(b"release")) == (1, 1)
    assert fake.fake_depth() == 0


def a_torch_without_gpus_is_said() -> None:
    wanted = "torch pins no memory"
    must_fail(lambda: CudaCopier(0, cubins=CUBINS), CudaUnavailableError, wanted)
    assert fake.fake_calls(b"release") == 1


def a_device_without_a_number_is_the_current_one() -> None:
    torch.cuda.current_device = lambda: 1
    copier = partial(CudaCopier, cubins=CUBINS)
    must_fail(lambda: copier(torch.device("cuda")), CudaUnavailableError, "GPU 1 cannot be used")
    must_fail(lambda: copier(torch.device("cuda", 2)), CudaUnavailableError, "GPU 2 cannot be used")
    must_fail(lambda: copier(torch.device("cpu")), ValueError, "device: cpu is no GPU")


def no_blocks_are_refused() -> None:
    session = Session()
    src, dst = session.pool("page_first", HOST), session.pool("device", DEVICE)
    copy = partial(session.copier.copy, plan_of(), src.layout, dst.layout)
    must_fail(lambda: copy(most_blocks=0), ValueError, "most_blocks: 0 is less than 1")


def must_fail(call: Callable[[], object], kind: type[Exception], said: str) -> None:
    try:
        call()
    except kind as error:
        assert said in str(error), error
    else:
        raise AssertionError(f"not said: {said}")


def load(cubin: bytes) -> None:
    gpu = Gpu(0)
    with gpu.current():
        gpu.load(cubin, "something")


def closing_gives_it_all_back() -> None:
    session = Session()
    src, dst = session.pool("page_first", HOST), session.pool("device", DEVICE, fill=2)
    check_copy(session, src, dst)
    session.copier.close()
    session.copier.close()
    assert (fake.fake_calls(b"unload"), fake.fake_calls(b"release")) == (1, 1)


def closing_waits_for_what_is_under_way() -> None:
    """Of kernels, of the copy engine and of a copy by layers that nobody closed, each on a stream of its own."""
    session = Session()
    src = session.pool("page_first", HOST)
    into = [session.pool("page_first", DEVICE, fill=2) for _ in range(3)]
    wanted = into[0].twin()
    copy_by_torch(src, wanted, *PAGES, range(SHAPE.layers))
    for way, dst, number in zip(Way, into, [11, 12], strict=False):
        stream: Any = OneStream(number)
        session.copier.copy(plan_of(), src.layout, dst.layout, way=way, stream=stream)
    copies = session.copier.layered(plan_of(), src.layout, into[2].layout)
    for layer in copies.layers:
        copies.copy(layer)
    session.copier.close()
    assert session.waits == 3
    assert all(dst.same(wanted) for dst in into)
    again = partial(session.copier.copy, plan_of(), src.layout, into[0].layout)
    must_fail(again, ValueError, "copier: it is closed")
    must_fail(lambda: copies.copy(0), ValueError, "copier: it is closed")
    copies.close()


def the_direct_path_moves_pages_as_torch_does() -> None:
    """hicache/device_copiers.py: records to a device pool layer by layer, and back; torch on a twin says what is right."""
    span, widths, layers = 4, (16, 8), 3
    buffers = [
        torch.randint(0, 256, (40, width), dtype=torch.uint8)
        for width in widths
        for _ in range(layers)
    ]
    mirror = [buffer.clone() for buffer in buffers]
    session = Session()

    def pages(of: list[torch.Tensor], make: MakesCopier) -> DevicePages:
        halves = [0, span * layers * widths[0]]
        runs = [
            Run(of[half * layers + at], halves[half] + at * width, layers * width)
            for half, width in enumerate(widths)
            for at in range(layers)
        ]
        return DevicePages(runs, span, {at: [at, layers + at] for at in range(layers)}, make)

    ours = pages(buffers, lambda groups, span: ByCuda(groups, span, session.copier))
    torchs = pages(mirror, ByTorch)
    records = torch.zeros((5, ours.page_bytes), dtype=torch.uint8)
    known = [(records, HOST), *((buffer, DEVICE) for buffer in buffers)]
    for memory, where in known:
        fake.fake_register(memory.data_ptr(), memory.nbytes, where)
        session.ranges.append((memory.data_ptr(), memory.nbytes))
    firsts, chosen = torch.tensor([8, 0, 20]), torch.tensor([4, 1, 2])
    ours.gather(firsts, records[1:4])
    assert not records.any()  # nothing is done before the GPU does it
    session.run()
    wanted = torch.zeros_like(records)
    torchs.gather(firsts, wanted[1:4])
    assert torch.equal(records, wanted)
    records.random_(0, 256)
    with (
        ours.scattering(firsts, records, chosen) as scatter,
        torchs.scattering(firsts, records, chosen) as right,
    ):
        for layer in (2, 0):
            scatter(layer)
            session.run()
            right(layer)
            assert all(map(torch.equal, buffers, mirror)), layer
    assert session.waits == 0


CHECKS = {
    check.__name__: check
    for check in [
        every_layout_from_and_to_host_memory,
        long_runs_go_to_the_copy_engine,
        an_older_driver_gets_single_copies,
        one_launch_and_one_event_a_layer,
        eighty_layers_wait_for_nothing,
        every_layout_a_layer_at_a_time,
        rows_that_are_apart_in_some_layers_only,
        each_layer_has_the_word_that_fits_it,
        long_runs_of_a_layer_go_to_the_copy_engine,
        a_layer_at_a_time_converts_too,
        a_copy_that_is_refused_enqueues_no_layer,
        tables_outlive_their_launches,
        conversions_there_and_back,
        memory_that_is_not_pinned_is_refused,
        many_records_of_one_slab_cost_a_few_calls,
        a_hole_between_two_pinned_pieces_is_refused,
        a_gpu_that_reads_all_memory_needs_none_of_it_pinned,
        nothing_to_copy_is_nothing_asked,
        what_the_driver_refuses_is_said,
        a_cubin_that_the_driver_refuses_is_not_the_last_word,
        what_fails_at_the_start_is_given_back,
        a_torch_without_gpus_is_said,
        a_device_without_a_number_is_the_current_one,
        no_blocks_are_refused,
        closing_gives_it_all_back,
        closing_waits_for_what_is_under_way,
        the_direct_path_moves_pages_as_torch_does,
    ]
}

if __name__ == "__main__":
    CHECKS[sys.argv[1]]()
