"""SGLang's copies between the device pool and the host pool, by this project's own kernels.

Same names, keyword arguments and effect as the operations of `sgl_kernel.kvcacheio` (those of
recurrent state: `sglang.kernels.ops.mamba.transfer_mamba`) that the modules of
`sglang.srt.mem_cache.pool_host` call; all of them return when the copy is done. Each one says where the
rows of both pools lie, and `copy_pages` does the rest. The device pool is one tensor [token, head, dim] a
layer; "lf" is a host pool of the same kind. The other layouts of the host pool are, K and V each for itself:

    pf  page_first          [token, layer, head, dim]
    ph  page_head           [page, head, slot, layer, dim]
        page_first_direct   [page, layer, slot, head, dim]

`*_layers` in an all-layer operation is a table of addresses, one a layer, as the GPU kernels take
it; how much memory is there nobody says. "mla" are the operations on a pool of one row a token, not of K and V;
"mamba" those on one of a state a slot, which is such a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from torch import Tensor

from ...kernels.copy_plan import CopyPlan, copy_pages
from ...kernels.layout import PageLayout, Plane


def transfer_kv_per_layer(
    *,
    src_k: Tensor,
    dst_k: Tensor,
    src_v: Tensor,
    dst_v: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    item_size: int,
) -> None:
    _copy(_rows([src_k, src_v]), _rows([dst_k, dst_v]), src_indices, dst_indices)


def transfer_kv_per_layer_mla(
    *, src: Tensor, dst: Tensor, src_indices: Tensor, dst_indices: Tensor, item_size: int
) -> None:
    _copy(_rows([src]), _rows([dst]), src_indices, dst_indices)


def transfer_kv_all_layer(
    *,
    src_k_layers: Tensor,
    dst_k_layers: Tensor,
    src_v_layers: Tensor,
    dst_v_layers: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    item_size: int,
    num_layers: int,
) -> None:
    sources = _rows_at([src_k_layers, src_v_layers], num_layers, src_indices, item_size)
    targets = _rows_at([dst_k_layers, dst_v_layers], num_layers, dst_indices, item_size)
    _copy(sources, targets, src_indices, dst_indices)


def transfer_kv_all_layer_mla(
    *,
    src_layers: Tensor,
    dst_layers: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    item_size: int,
    num_layers: int,
) -> None:
    sources = _rows_at([src_layers], num_layers, src_indices, item_size)
    targets = _rows_at([dst_layers], num_layers, dst_indices, item_size)
    _copy(sources, targets, src_indices, dst_indices)


def transfer_kv_per_layer_pf_lf(
    *,
    src_k: Tensor,
    dst_k: Tensor,
    src_v: Tensor,
    dst_v: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    layer_id: int,
    item_size: int,
    src_layout_dim: int,
) -> None:
    sources = _page_first([src_k, src_v], item_size, src_layout_dim).select(layers=_only(layer_id))
    _copy(sources, _rows([dst_k, dst_v]), src_indices, dst_indices)


def transfer_kv_per_layer_mla_pf_lf(
    *,
    src: Tensor,
    dst: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    layer_id: int,
    item_size: int,
    src_layout_dim: int,
) -> None:
    sources = _page_first([src], item_size, src_layout_dim).select(layers=_only(layer_id))
    _copy(sources, _rows([dst]), src_indices, dst_indices)


transfer_kv_mamba_pf_lf = transfer_kv_per_layer_mla_pf_lf


def transfer_kv_all_layer_lf_pf(
    *,
    src_k_layers: Tensor,
    dst_k: Tensor,
    src_v_layers: Tensor,
    dst_v: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    item_size: int,
    dst_layout_dim: int,
    num_layers: int,
) -> None:
    sources = _rows_at([src_k_layers, src_v_layers], num_layers, src_indices, item_size)
    targets = _page_first([dst_k, dst_v], item_size, dst_layout_dim)
    _copy(sources, targets, src_indices, dst_indices)


def transfer_kv_all_layer_mla_lf_pf(
    *,
    src_layers: Tensor,
    dst: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    item_size: int,
    dst_layout_dim: int,
    num_layers: int,
) -> None:
    sources = _rows_at([src_layers], num_layers, src_indices, item_size)
    _copy(sources, _page_first([dst], item_size, dst_layout_dim), src_indices, dst_indices)


def transfer_kv_mamba_lf_pf(
    *,
    src_ptrs: Tensor,
    dst: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    item_size: int,
    dst_layout_dim: int,
    num_layers: int,
) -> None:
    transfer_kv_all_layer_mla_lf_pf(
        src_layers=src_ptrs,
        dst=dst,
        src_indices=src_indices,
        dst_indices=dst_indices,
        item_size=item_size,
        dst_layout_dim=dst_layout_dim,
        num_layers=num_layers,
    )


def transfer_kv_per_layer_ph_lf(
    *,
    src_k: Tensor,
    dst_k: Tensor,
    src_v: Tensor,
    dst_v: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    layer_id: int,
    item_size: int,
    src_layout_dim: int,
    page_size: int,
    head_num: int,
) -> None:
    pages = _page_head([src_k, src_v], item_size, src_layout_dim, page_size, head_num)
    targets = _by_head(_rows([dst_k, dst_v]), head_num)
    _copy(pages.select(layers=_only(layer_id)), targets, src_indices, dst_indices)


def transfer_kv_all_layer_lf_ph(
    *,
    src_k_layers: Tensor,
    dst_k: Tensor,
    src_v_layers: Tensor,
    dst_v: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    item_size: int,
    dst_layout_dim: int,
    num_layers: int,
    page_size: int,
    head_num: int,
) -> None:
    tables = [src_k_layers, src_v_layers]
    sources = _by_head(_rows_at(tables, num_layers, src_indices, item_size), head_num)
    targets = _page_head([dst_k, dst_v], item_size, dst_layout_dim, page_size, head_num)
    _copy(sources, targets, src_indices, dst_indices)


def transfer_kv_direct(
    *,
    src_layers: Sequence[Tensor],
    dst_layers: Sequence[Tensor],
    src_indices: Tensor,
    dst_indices: Tensor,
    page_size: int,
) -> None:
    pairs = zip(src_layers, dst_layers, strict=True)
    # A model without a recurrent part has states of no bytes.
    filled = [(src, dst) for src, dst in pairs if src.numel()]
    if filled:
        sources, targets = zip(*filled, strict=True)
        _copy(_rows(sources), _rows(targets), src_indices, dst_indices)


def transfer_kv_per_layer_direct_pf_lf(
    *,
    src_ptrs: Sequence[Tensor],
    dst_ptrs: Sequence[Tensor],
    src_indices: Tensor,
    dst_indices: Tensor,
    layer_id: int,
    page_size: int,
) -> None:
    _copy(_pages(src_ptrs, [layer_id]), _rows(dst_ptrs), src_indices, dst_indices)


def transfer_kv_all_layer_direct_lf_pf(
    *,
    src_ptrs: Sequence[Tensor],
    dst_ptrs: Sequence[Tensor],
    src_indices: Tensor,
    dst_indices: Tensor,
    page_size: int,
) -> None:
    """`src_ptrs` holds all layers of K, then all layers of V; `dst_ptrs` holds K and V."""
    num_layers = len(src_ptrs) // len(dst_ptrs)
    _copy(_rows(src_ptrs), _pages(dst_ptrs, range(num_layers)), src_indices, dst_indices)


def _copy(src: PageLayout, dst: PageLayout, src_indices: Tensor, dst_indices: Tensor) -> None:
    copy_pages(CopyPlan(src_indices.contiguous(), dst_indices.contiguous()), src, dst)


# All of these see bytes, and one long page where the pool has no pages: what is contiguous is found all the same.


def _only(layer: int) -> range:
    return range(layer, layer + 1)


def _rows(tensors: Sequence[Tensor]) -> PageLayout:
    """A plane a tensor [row, ...]."""
    planes = [
        Plane((each.data_ptr(),), 0, _bytes(each, 0), 0, _inner_bytes(each, 1)) for each in tensors
    ]
    return _layout(planes, 1, min(len(each) for each in tensors), _memory(tensors))


def _pages(tensors: Sequence[Tensor], layers: Sequence[int]) -> PageLayout:
    """A plane for each tensor [page, layer, row, ...] and layer."""
    planes = [
        Plane(
            (each.data_ptr() + layer * _bytes(each, 1),),
            _bytes(each, 0),
            _bytes(each, 2),
            0,
            _inner_bytes(each, 3),
        )
        for each in tensors
        for layer in layers
    ]
    return _layout(planes, len(tensors[0]), tensors[0].shape[2], _memory(tensors))


def _page_first(hosts: Sequence[Tensor], item_size: int, layout_dim: int) -> PageLayout:
    layers = range(0, layout_dim, item_size)
    planes = [
        Plane(tuple(each.data_ptr() + begin for begin in layers), 0, layout_dim, 0, item_size)
        for each in hosts
    ]
    return _layout(planes, 1, hosts[0].nbytes // layout_dim, _memory(hosts))


def _page_head(
    hosts: Sequence[Tensor], item_size: int, layout_dim: int, page_size: int, head_num: int
) -> PageLayout:
    run, token, page = item_size // head_num, layout_dim // head_num, layout_dim * page_size
    planes = [
        Plane(
            tuple(each.data_ptr() + begin for begin in range(0, token, run)),
            page,
            token,
            token * page_size,
            run,
        )
        for each in hosts
    ]
    return _layout(planes, hosts[0].nbytes // page, page_size, _memory(hosts), head_num)


def _rows_at(
    tables: Sequence[Tensor], num_layers: int, indices: Tensor, item_size: int
) -> PageLayout:
    """As many rows at each address as `indices` reach; the pool owns the memory."""
    rows = int(indices.max()) + 1 if len(indices) else 1
    layers = [tuple(table[:num_layers].tolist()) for table in tables]
    planes = [Plane(each, 0, item_size, 0, item_size) for each in layers]
    memory = [(address, rows * item_size) for address in chain.from_iterable(layers)]
    return _layout(planes, 1, rows, memory)


def _by_head(rows: PageLayout, head_num: int) -> PageLayout:
    planes = [
        replace(plane, run=plane.run // head_num, head_stride=plane.run // head_num)
        for plane in rows.planes
    ]
    return replace(rows, planes=tuple(planes), heads=head_num)


def _layout(
    planes: Sequence[Plane],
    pages: int,
    page_size: int,
    memory: Sequence[tuple[int, int]],
    heads: int = 1,
) -> PageLayout:
    return PageLayout(tuple(planes), pages, page_size, heads, 1, tuple(memory))


def _bytes(tensor: Tensor, axis: int) -> int:
    return tensor.stride(axis) * tensor.element_size()


def _inner_bytes(tensor: Tensor, axes: int) -> int:
    """Of what one index of the first axes has."""
    if not tensor[(0,) * axes].is_contiguous():
        raise ValueError(f"rows of {tuple(tensor.shape)} with strides {tensor.stride()} are cut")
    return tensor[(0,) * axes].nbytes


def _memory(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """From the first to behind the last byte of each."""
    ranges = []
    for each in tensors:
        last = sum((n - 1) * step for n, step in zip(each.shape, each.stride(), strict=True))
        ranges.append((each.data_ptr(), (last + 1) * each.element_size()))
    return ranges
