"""Tiny random models of each family that keeps its state in pools of another kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .tiny_model import COMMON, Dtype, save_random_model

VOCABULARY = 512
MAX_TOKENS = 8192
WINDOW = 96  # tokens that a token sees in a layer with a window, itself included


def make_tiny(family: str, path: str | Path, *, seed: int = 0, dtype: Dtype = "float32") -> Path:
    """Write a checkpoint of a family of `FAMILIES` into `path`, and return it."""
    return save_random_model(path, FAMILIES[family](), seed=seed, dtype=dtype)


def multi_head() -> Any:
    """Llama with as many KV heads as query heads (MHA): one pool."""
    from transformers import LlamaConfig

    return LlamaConfig(**_sizes(), num_key_value_heads=4, head_dim=16, **COMMON)


def sliding_window() -> Any:
    """Mellum: layers with a window of `WINDOW` tokens keep their KV in a pool of their own (SWA)."""
    from transformers import MellumConfig

    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return MellumConfig(
        **_sizes(),
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 2,
        mlp_layer_types=["dense"] * 4,
        rope_parameters={"full_attention": rope, "sliding_attention": rope},
        **COMMON,
    )


def wide_latent() -> Any:
    """The same with DeepSeek's own latent row: vLLM's attention on a CPU has no other."""
    config = latent()
    config.kv_lora_rank, config.qk_rope_head_dim, config.head_dim = 512, 64, 64
    return config


def latent() -> Any:
    """DeepSeek-V2 without experts: one latent row a token and layer (MLA)."""
    from transformers import DeepseekV2Config

    return DeepseekV2Config(
        **_sizes(),
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=32,
        v_head_dim=32,
        first_k_dense_replace=4,
        n_routed_experts=1,
        moe_layer_freq=1,
        # SGLang has no other kind of rotary embedding for MLA on CPU (get_rope_cpu).
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "original_max_position_embeddings": MAX_TOKENS // 2,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        **COMMON,
    )


def recurrent() -> Any:
    """Falcon-H1: attention beside Mamba-2 in each layer (convolution and state-space state)."""
    from transformers import FalconH1Config

    return FalconH1Config(
        **_sizes(),
        num_key_value_heads=2,
        mamba_d_ssm=128,
        mamba_n_heads=4,
        mamba_d_head=32,
        mamba_d_state=16,
        mamba_chunk_size=64,
        key_multiplier=1.0,
        attention_in_multiplier=1.0,
        attention_out_multiplier=1.0,
        ssm_in_multiplier=1.0,
        ssm_out_multiplier=1.0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **COMMON,
    )


def short_convolution() -> Any:
    """LFM2: some layers attend, the others keep the last two inputs of a convolution."""
    from transformers import Lfm2Config

    return Lfm2Config(
        **_sizes(),
        num_key_value_heads=2,
        block_auto_adjust_ff_dim=False,
        layer_types=["conv", "full_attention"] * 2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **COMMON,
    )


FAMILIES: Mapping[str, Callable[[], Any]] = {
    "mha": multi_head,
    "swa": sliding_window,
    "mla": latent,
    "wide-mla": wide_latent,
    "mamba": recurrent,
    "conv": short_convolution,
}


def _sizes() -> dict[str, int]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
    }
