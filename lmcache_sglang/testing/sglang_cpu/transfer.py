"""SGLang's copies between the device pool and the host pool, in torch.

Same names, keyword arguments and effect as the operations of `sgl_kernel.kvcacheio` (those of
recurrent state: `sglang.kernels.ops.mamba.transfer_mamba`) that the modules of
`sglang.srt.mem_cache.pool_host` call; all of them return when the copy is done. The device pool is
one tensor [token, head, dim] a layer; "lf" is a host pool of the same kind. The other layouts of the
host pool are all seen here as [page, slot, layer, ...], K and V each for itself:

    pf  page_first          [token, layer, head, dim]
    ph  page_head           [page, head, slot, layer, dim]
        page_first_direct   [page, layer, slot, head, dim]

`*_layers` in an all-layer operation is a table of addresses, one a layer, as the GPU kernels take
it. "mla" are the operations on a pool of one row a token, not of K and V; "mamba" those on one of a
state a slot, which is such a row.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


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
    for src, dst in ((src_k, dst_k), (src_v, dst_v)):
        transfer_kv_per_layer_mla(
            src=src,
            dst=dst,
            src_indices=src_indices,
            dst_indices=dst_indices,
            item_size=item_size,
        )


def transfer_kv_per_layer_mla(
    *, src: Tensor, dst: Tensor, src_indices: Tensor, dst_indices: Tensor, item_size: int
) -> None:
    _rows(dst, item_size)[dst_indices] = _rows(src, item_size)[src_indices]


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
    for src, dst in ((src_k_layers, dst_k_layers), (src_v_layers, dst_v_layers)):
        transfer_kv_all_layer_mla(
            src_layers=src,
            dst_layers=dst,
            src_indices=src_indices,
            dst_indices=dst_indices,
            item_size=item_size,
            num_layers=num_layers,
        )


def transfer_kv_all_layer_mla(
    *,
    src_layers: Tensor,
    dst_layers: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    item_size: int,
    num_layers: int,
) -> None:
    sources = _rows_at(src_layers[:num_layers], src_indices, item_size)
    targets = _rows_at(dst_layers[:num_layers], dst_indices, item_size)
    for source, target in zip(sources, targets, strict=True):
        target[dst_indices] = source[src_indices]


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
    for src, dst in ((src_k, dst_k), (src_v, dst_v)):
        transfer_kv_per_layer_mla_pf_lf(
            src=src,
            dst=dst,
            src_indices=src_indices,
            dst_indices=dst_indices,
            layer_id=layer_id,
            item_size=item_size,
            src_layout_dim=src_layout_dim,
        )


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
    pages = _page_first(src, item_size, src_layout_dim)
    _load_layer(pages, _rows(dst, item_size), src_indices, dst_indices, layer_id)


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
    for layers, dst in ((src_k_layers, dst_k), (src_v_layers, dst_v)):
        transfer_kv_all_layer_mla_lf_pf(
            src_layers=layers,
            dst=dst,
            src_indices=src_indices,
            dst_indices=dst_indices,
            item_size=item_size,
            dst_layout_dim=dst_layout_dim,
            num_layers=num_layers,
        )


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
    pages = _page_first(dst, item_size, dst_layout_dim)
    sources = _rows_at(src_layers[:num_layers], src_indices, item_size)
    _store_layers(sources, pages, src_indices, dst_indices)


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
    for src, dst in ((src_k, dst_k), (src_v, dst_v)):
        pages = _page_head(src, item_size, src_layout_dim, page_size, head_num)
        _load_layer(pages, _rows(dst, item_size), src_indices, dst_indices, layer_id)


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
    for layers, dst in ((src_k_layers, dst_k), (src_v_layers, dst_v)):
        pages = _page_head(dst, item_size, dst_layout_dim, page_size, head_num)
        sources = _rows_at(layers[:num_layers], src_indices, item_size)
        _store_layers(sources, pages, src_indices, dst_indices)


def transfer_kv_direct(
    *,
    src_layers: Sequence[Tensor],
    dst_layers: Sequence[Tensor],
    src_indices: Tensor,
    dst_indices: Tensor,
    page_size: int,
) -> None:
    for src, dst in zip(src_layers, dst_layers, strict=True):
        dst[dst_indices] = src[src_indices]


def transfer_kv_per_layer_direct_pf_lf(
    *,
    src_ptrs: Sequence[Tensor],
    dst_ptrs: Sequence[Tensor],
    src_indices: Tensor,
    dst_indices: Tensor,
    layer_id: int,
    page_size: int,
) -> None:
    for src, dst in zip(src_ptrs, dst_ptrs, strict=True):
        _load_layer(src.transpose(1, 2), dst, src_indices, dst_indices, layer_id)


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
    for i, dst in enumerate(dst_ptrs):
        sources = src_ptrs[i * num_layers : (i + 1) * num_layers]
        _store_layers(sources, dst.transpose(1, 2), src_indices, dst_indices)


def _load_layer(
    pages: Tensor, rows: Tensor, src_indices: Tensor, dst_indices: Tensor, layer: int
) -> None:
    size = pages.shape[1]
    tokens = pages[src_indices // size, src_indices % size, layer]
    rows[dst_indices] = tokens.reshape(len(src_indices), *rows.shape[1:])


def _store_layers(
    layers: Iterable[Tensor], pages: Tensor, src_indices: Tensor, dst_indices: Tensor
) -> None:
    size = pages.shape[1]
    for layer, rows in enumerate(layers):
        tokens = rows[src_indices].view(len(src_indices), *pages.shape[3:])
        pages[dst_indices // size, dst_indices % size, layer] = tokens


def _page_first(host: Tensor, item_size: int, layout_dim: int) -> Tensor:
    return host.view(torch.uint8).view(-1, 1, layout_dim // item_size, item_size)


def _page_head(
    host: Tensor, item_size: int, layout_dim: int, page_size: int, head_num: int
) -> Tensor:
    shape = (-1, head_num, page_size, layout_dim // item_size, item_size // head_num)
    return host.view(torch.uint8).view(shape).permute(0, 2, 3, 1, 4)


def _rows(tensor: Tensor, item_size: int) -> Tensor:
    """The bytes of a contiguous tensor, a token a row."""
    return tensor.view(torch.uint8).view(-1, item_size)


def _rows_at(addresses: Tensor, indices: Tensor, item_size: int) -> Iterable[Tensor]:
    """The bytes at each address, as many rows as `indices` reach; the pool owns the memory."""
    count = int(indices.max()) + 1 if len(indices) else 1
    for address in addresses.tolist():
        memory = (ctypes.c_uint8 * (count * item_size)).from_address(address)
        yield torch.frombuffer(memory, dtype=torch.uint8).view(count, item_size)
