"""Multi-head latent attention (DeepSeek's MLA) on SGLang's torch backend.

A prompt without a cached prefix takes the form with full heads, whose keys and values never enter the
pool. `TorchNativeAttnBackend` reads all keys from the pool, finds latent rows there, and fails on
their width (64 against 96). The absorbed form, which SGLang uses for all other tokens, attends to the
latent rows themselves, and torch computes it as it is: queries of kv_lora_rank + qk_rope_head_dim
against one KV head, whose values are the first kv_lora_rank numbers of a row.
"""

from __future__ import annotations

from typing import Any


def absorb_always() -> None:
    """Take the absorbed form for every token; SGLang asks this registry for each batch."""
    from sglang.srt.models.deepseek_common.attention_backend_handler import (
        AttentionBackendRegistry,
    )

    AttentionBackendRegistry.register("torch_native", _absorbed)


def _absorbed(attention: Any, forward_batch: Any) -> Any:
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import (
        AttnForwardMethod,
    )

    return AttnForwardMethod.MLA
