"""Which attention keeps its blocks in an order that is known: no interface of vLLM's tells it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UnsupportedEngineError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from .groups import Group

# A token and head's K and V, or latent, lie in one row of the view, as each one's code splits it (vLLM 0.32, v1/attention).
ROWS = frozenset(
    {
        "AMX_MLA",
        "CPU_MLA",
        "CUTLASS_MLA",
        "FLASHINFER",
        "FLASHINFER_MLA",
        "FLASHMLA",
        "FLASH_ATTN",
        "FLASH_ATTN_DIFFKV",
        "FLASH_ATTN_MLA",
        "FLEX_ATTENTION",
        "TRITON_ATTN",
        "TRITON_ATTN_DIFFKV",
        "TRITON_FLASHINFER",  # both of the parts of these
        "TRITON_FLASH_ATTN",
        "TRITON_MLA",
    }
)
PACKED = frozenset({"CPU_ATTN"})  # in an order that is asked for (cpu_packing.py)


def is_packed(group: Group, config: VllmConfig) -> bool:
    """Whether a group's blocks are in an order of their own, and not in rows.

    Raises:
        UnsupportedEngineError: nothing is known of it.
    """
    layers = config.compilation_config.static_forward_context
    names = {layers[name].get_attn_backend().get_name() for name in group.layer_names}
    if unknown := names - ROWS - PACKED:
        raise UnsupportedEngineError(
            f"lmcache: in which order {', '.join(sorted(unknown))} keeps the blocks of KV cache group {group.number} is "
            f"not known; choose another --attention-backend ({', '.join(sorted(ROWS))}), or serve without "
            "--kv-transfer-config"
        )
    if names & ROWS and names & PACKED:
        raise UnsupportedEngineError(
            f"lmcache: KV cache group {group.number} has several attention backends ({', '.join(sorted(names))}); serve "
            "without --kv-transfer-config"
        )
    return bool(names & PACKED)
