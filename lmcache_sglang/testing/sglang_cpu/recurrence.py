"""Where SGLang looks for the kernels of recurrent layers, which it has for accelerators only."""

from __future__ import annotations

import torch

from . import convolution, state_space
from .finder import absent

# Taken by name where SGLang chooses between kinds of linear attention; the gated delta rule calls them.
_OPERATIONS = ("fused_sigmoid_gating_delta_rule_update_cpu", "fused_gdn_gating_cpu")


def offer() -> None:
    """Without it a model with such layers fails at its first token, with a NameError or in Triton."""
    from sglang.srt.layers.attention.mamba import causal_conv1d, mamba

    for convolve in (convolution.causal_conv1d_fn, convolution.causal_conv1d_update):
        setattr(mamba, convolve.__name__, convolve)  # not bound at all
        setattr(causal_conv1d, f"_{convolve.__name__}_triton", convolve)  # what its functions call
    for step in (state_space.mamba_chunk_scan_combined, state_space.selective_state_update):
        setattr(mamba, step.__name__, step)
    for name in _OPERATIONS:
        if not hasattr(torch.ops.sgl_kernel, name):
            setattr(torch.ops.sgl_kernel, name, absent("sgl_kernel", name))
