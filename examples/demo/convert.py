"""GGUF to what SGLang serves: dequantised bfloat16 weights and a tokenizer with a chat template.

python -m examples.demo.convert FILE.gguf FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM

TEMPLATE = Path(__file__).with_name("plain_chat.jinja")


def convert(gguf: Path, target: Path) -> None:
    """Write a checkpoint into `target`."""
    _convert_weights(gguf, target)
    _convert_tokenizer(gguf, target)


def _convert_weights(gguf: Path, target: Path) -> None:
    """Into a model made anew: the one that was read remembers that it was quantised."""
    read = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config = read.config
    del config.quantization_config
    model = Gemma3ForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(target)


def _convert_tokenizer(gguf: Path, target: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
