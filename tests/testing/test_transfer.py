"""The copies between the pools, against one that moves token by token, in every layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lmcache_sglang.testing.sglang_cpu import transfer

LAYERS, PAGES, PAGE, HEADS, DIM = 3, 4, 4, 2, 8
TOKENS = PAGES * PAGE
ITEM = HEADS * DIM * 2  # bytes of a token in a layer, in bfloat16
LAYOUT_DIM = ITEM * LAYERS
SHAPES = {
    "layer_first": (LAYERS, TOKENS, HEADS, DIM),
    "page_first": (TOKENS, LAYERS, HEADS, DIM),
    "page_head": (PAGES, HEADS, PAGE, LAYERS, DIM),
    "page_first_direct": (PAGES, LAYERS, PAGE, HEADS, DIM),
}
MODES = [
    ("layer_first", "kernel"),
    ("layer_first", "direct"),
    ("page_first", "kernel"),
    ("page_head", "kernel"),
    ("page_first_direct", "direct"),
]


@pytest.mark.parametrize(("layout", "io"), MODES)
def test_a_copy_to_the_host_puts_each_token_where_the_layout_says(layout: str, io: str) -> None:
    device, host, expected = _pair(_random()), _pair(_zeros(layout)), _pair(_zeros(layout))
    here, there = _tokens_of(2, 0), _tokens_of(1, 3)
    for source, target in zip(device, expected, strict=True):
        for token, slot in zip(here.tolist(), there.tolist(), strict=True):
            for layer in range(LAYERS):
                _at(layout, target, layer, slot).copy_(source[layer, token])

    _copy_to_host(layout, io, device, host, here, there)

    assert all(map(torch.equal, host, expected))


@pytest.mark.parametrize(("layout", "io"), MODES)
def test_a_copy_from_the_host_touches_one_layer_and_the_named_tokens(layout: str, io: str) -> None:
    host = _pair(lambda: torch.randn(SHAPES[layout]).bfloat16())
    device, expected = _pair(_zeros("layer_first")), _pair(_zeros("layer_first"))
    here, there = _tokens_of(3, 1), _tokens_of(0, 2)
    for source, target in zip(host, expected, strict=True):
        for token, slot in zip(here.tolist(), there.tolist(), strict=True):
            target[1, slot] = _at(layout, source, 1, token)

    _copy_layer_from_host(layout, io, host, device, here, there, layer=1)

    assert all(map(torch.equal, device, expected))


@pytest.mark.parametrize(("layout", "io"), MODES)
def test_a_copy_of_no_tokens_is_none(layout: str, io: str) -> None:
    device, host, nothing = _pair(_random()), _pair(_zeros(layout)), torch.arange(0)
    before = [tensor.clone() for tensor in device]

    _copy_to_host(layout, io, device, host, nothing, nothing)
    _copy_layer_from_host(layout, io, host, device, nothing, nothing, layer=0)

    assert not any(tensor.any() for tensor in host)
    assert all(map(torch.equal, device, before))


def _pair(make: Callable[[], Tensor]) -> list[Tensor]:
    """K and V."""
    return [make(), make()]


def _random() -> Callable[[], Tensor]:
    return lambda: torch.randn(SHAPES["layer_first"]).bfloat16()


def _zeros(layout: str) -> Callable[[], Tensor]:
    return lambda: torch.zeros(SHAPES[layout], dtype=torch.bfloat16)


def _tokens_of(*pages: int) -> Tensor:
    return torch.cat([torch.arange(page * PAGE, (page + 1) * PAGE) for page in pages])


def _at(layout: str, host: Tensor, layer: int, token: int) -> Tensor:
    """The plain reference: one token's [head, dim] in a host pool."""
    page, slot = divmod(token, PAGE)
    return {
        "layer_first": lambda: host[layer, token],
        "page_first": lambda: host[token, layer],
        "page_head": lambda: host[page, :, slot, layer],
        "page_first_direct": lambda: host[page, layer, slot],
    }[layout]()


def _addresses(pool: Tensor) -> Tensor:
    return torch.tensor([layer.data_ptr() for layer in pool], dtype=torch.uint64)


def _copy_to_host(
    layout: str, io: str, device: list[Tensor], host: list[Tensor], here: Tensor, there: Tensor
) -> None:
    """As MHATokenToKVPoolHost.backup_from_device_all_layer calls it."""
    where: dict[str, Any] = {"src_indices": here, "dst_indices": there}
    k, v = map(_addresses, device)
    tables: dict[str, Any] = {"src_k_layers": k, "src_v_layers": v, "item_size": ITEM}
    tables["num_layers"] = LAYERS
    pool: dict[str, Any] = {"dst_k": host[0], "dst_v": host[1], "dst_layout_dim": LAYOUT_DIM}
    match layout, io:
        case "layer_first", "kernel":
            k, v = map(_addresses, host)
            transfer.transfer_kv_all_layer(**tables, dst_k_layers=k, dst_v_layers=v, **where)
        case "layer_first", "direct":
            layers = [[*pools[0], *pools[1]] for pools in (device, host)]
            transfer.transfer_kv_direct(
                src_layers=layers[0], dst_layers=layers[1], page_size=PAGE, **where
            )
        case "page_first", "kernel":
            transfer.transfer_kv_all_layer_lf_pf(**tables, **pool, **where)
        case "page_head", "kernel":
            pool |= {"page_size": PAGE, "head_num": HEADS}
            transfer.transfer_kv_all_layer_lf_ph(**tables, **pool, **where)
        case "page_first_direct", "direct":
            transfer.transfer_kv_all_layer_direct_lf_pf(
                src_ptrs=[*device[0], *device[1]], dst_ptrs=host, page_size=PAGE, **where
            )
        case _:
            raise AssertionError(layout, io)


def _copy_layer_from_host(
    layout: str,
    io: str,
    host: list[Tensor],
    device: list[Tensor],
    here: Tensor,
    there: Tensor,
    *,
    layer: int,
) -> None:
    """As MHATokenToKVPoolHost.load_to_device_per_layer calls it."""
    where: dict[str, Any] = {"src_indices": here, "dst_indices": there}
    k, v = rows = [pool[layer] for pool in device]
    target: dict[str, Any] = {"dst_k": k, "dst_v": v, "item_size": ITEM}
    pool: dict[str, Any] = {"src_k": host[0], "src_v": host[1], "src_layout_dim": LAYOUT_DIM}
    match layout, io:
        case "layer_first", "kernel":
            k, v = host[0][layer], host[1][layer]
            transfer.transfer_kv_per_layer(src_k=k, src_v=v, **target, **where)
        case "layer_first", "direct":
            transfer.transfer_kv_direct(
                src_layers=[p[layer] for p in host], dst_layers=rows, page_size=PAGE, **where
            )
        case "page_first", "kernel":
            transfer.transfer_kv_per_layer_pf_lf(**pool, **target, layer_id=layer, **where)
        case "page_head", "kernel":
            pool |= {"page_size": PAGE, "head_num": HEADS}
            transfer.transfer_kv_per_layer_ph_lf(**pool, **target, layer_id=layer, **where)
        case "page_first_direct", "direct":
            transfer.transfer_kv_per_layer_direct_pf_lf(
                src_ptrs=host, dst_ptrs=rows, layer_id=layer, page_size=PAGE, **where
            )
        case _:
            raise AssertionError(layout, io)


@pytest.mark.parametrize("layout", ["layer_first", "page_first"])
def test_rows_of_one_pool_go_to_the_host_and_back(layout: str) -> None:
    """As MLATokenToKVPoolHost and MambaPoolHost call it: one row a token or slot, not K and V."""
    device, host = _random()(), _zeros(layout)()
    back = _zeros("layer_first")()
    here, there = _tokens_of(2, 0), _tokens_of(1, 3)
    where: dict[str, Any] = {"src_indices": here, "dst_indices": there, "item_size": ITEM}
    table = _addresses(device)
    size: dict[str, Any] = {"num_layers": LAYERS, "dst_layout_dim": LAYOUT_DIM}
    if layout == "layer_first":
        transfer.transfer_kv_all_layer_mla(
            src_layers=table, dst_layers=_addresses(host), num_layers=LAYERS, **where
        )
    else:
        transfer.transfer_kv_mamba_lf_pf(src_ptrs=table, dst=host, **size, **where)
        other = _zeros(layout)()
        transfer.transfer_kv_all_layer_mla_lf_pf(src_layers=table, dst=other, **size, **where)
        assert torch.equal(host, other)
    for token, slot in zip(here.tolist(), there.tolist(), strict=True):
        for layer in range(LAYERS):
            assert torch.equal(_at(layout, host, layer, slot), device[layer, token])

    where |= {"src_indices": there, "dst_indices": here}
    for layer in range(LAYERS):
        if layout == "layer_first":
            transfer.transfer_kv_per_layer_mla(src=host[layer], dst=back[layer], **where)
        else:
            transfer.transfer_kv_per_layer_mla_pf_lf(
                src=host, dst=back[layer], layer_id=layer, src_layout_dim=LAYOUT_DIM, **where
            )
    assert torch.equal(back[:, here], device[:, here])
    untouched = sorted(set(range(TOKENS)) - set(here.tolist()))
    assert not back[:, untouched].any()
