"""A Llama of random weights with a tokenizer and a chat template, made in about a second.

The same arguments give the same files; another seed gives other weights and the same tokenizer, so
that two checkpoints can share a path and a shape and still answer differently.

    python -m lmcache_sglang.testing.tiny_model DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Dtype = Literal["bfloat16", "float16", "float32"]

SPECIAL_TOKENS = ("<s>", "</s>", "<pad>")
BOS, EOS, PAD = range(3)
TRAINING_TEXT = "the quick brown fox jumps over the lazy dog "
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
# Wide enough for the logits to depend on every cached token: with the default 0.02 an empty cache
# and a restored one pick the same next token, and a test of equality proves nothing.
INITIALIZER_RANGE = 0.2
# What the configurations of all tiny models say.
COMMON: Mapping[str, Any] = {
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,
    "initializer_range": INITIALIZER_RANGE,
}


def make_tiny_llama(
    path: str | Path,
    *,
    seed: int = 0,
    dtype: Dtype = "bfloat16",
    num_layers: int = 4,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    vocab_size: int = 512,
    max_tokens: int = 8192,
) -> Path:
    """Write a checkpoint into `path`, made if missing, and return it; older files are replaced."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=num_heads * head_dim,
        intermediate_size=2 * num_heads * head_dim,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_tokens,
        **COMMON,
    )
    return save_random_model(path, config, seed=seed, dtype=dtype)


def save_random_model(path: str | Path, config: Any, *, seed: int, dtype: Dtype) -> Path:
    """Write a model of this transformers configuration, with a tokenizer, into `path`.

    The weights are drawn in float32 and then rounded, so one seed gives one model in each dtype.
    The caller's random state is left as it was.
    """
    import torch
    from transformers import AutoModelForCausalLM

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    _save_tokenizer(folder, config.vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def _save_tokenizer(folder: Path, vocab_size: int) -> None:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level_bpe(vocab_size),
        bos_token=SPECIAL_TOKENS[BOS],
        eos_token=SPECIAL_TOKENS[EOS],
        pad_token=SPECIAL_TOKENS[PAD],
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def _byte_level_bpe(vocab_size: int) -> Tokenizer:
    """A tokenizer that knows every byte, hence any text, and a few words in one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TRAINING_TEXT * 20], trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description="write a tiny random Llama for tests")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=get_args(Dtype), default="bfloat16")
    parser.add_argument("--num-layers", type=int, default=4)
    args = parser.parse_args()
    made = make_tiny_llama(
        args.directory, seed=args.seed, dtype=args.dtype, num_layers=args.num_layers
    )
    print(made)


if __name__ == "__main__":
    main()
