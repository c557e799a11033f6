"""A LoRA adapter of random weights for a tiny Llama, in the form of PEFT's files, which both engines load."""

from __future__ import annotations

import json
from pathlib import Path

RANK = 8
TARGETS = ("q_proj", "k_proj", "v_proj")


def make_tiny_adapter(path: str | Path, model: str | Path, *, seed: int) -> Path:
    """Write an adapter into `path`, made if missing, and return it; older files are replaced.

    Args:
        model: the checkpoint that it is for.
        seed: of its weights, which are large enough to change what the model answers.
    """
    import torch
    from safetensors.torch import load_file, save_file

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, weight in load_file(Path(model) / "model.safetensors").items():
        if name.endswith(tuple(f"{target}.weight" for target in TARGETS)):
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            out, into = weight.shape
            weights[f"{stem}.lora_A.weight"] = torch.randn(RANK, into, generator=generator) / 4
            weights[f"{stem}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) / 4
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(TARGETS),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
