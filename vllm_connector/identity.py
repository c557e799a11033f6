"""What the running vLLM says of its model: the identity that SGLang's side gives the same weights (hicache/engine.py)."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from ..hicache.identity import UNREAD, ModelIdentity
from ..hicache.sources import Source

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

# Ways of loading that give the weights of the model's files as they are.
PLAIN_FORMATS = ("auto", "hf", "safetensors", "pt", "gguf", "mistral", "npcache", "fastsafetensors")
# Those that read the files in their own way, always the same.
FILE_FORMATS = (*PLAIN_FORMATS, "bitsandbytes", "runai_streamer", "sharded_state")
CONFIG_FORMATS = ("auto", "hf", "mistral")  # of the model's own files
LONG_ROPES = ("longrope", "su")
AUTO_LENGTH = -1  # --max-model-len auto
LLAMA4_LONG = 32768  # --max-model-len from which vLLM tunes Llama 4's attention by itself
NO_DRAFT = (
    "ngram",
    "ngram_gpu",
    "suffix",
    "custom_class",
)  # vLLM names the model itself for theirs


def model_identity(config: VllmConfig) -> ModelIdentity:
    """The identity of the model that this engine serves. The same in all its processes, but for weights that cannot be
    looked at: those are one process's own, and nothing of them is ever found."""
    model = config.model_config
    dtype = _name(model.dtype)
    kv_dtype = str(config.cache_config.cache_dtype)
    settings = {"dtype": dtype} | _settings(config) | _by_length(config) | _draft(config)
    if kv_dtype != "auto":  # scales of e4m3 are each engine's own
        settings["engine"] = "vllm"
    doubts = [*_doubts(config), *_changed(config)]
    for doubt in doubts:
        _warn(doubt)
    if doubts:
        settings["weights"] = uuid4().hex
    return ModelIdentity(
        name=_served_name(model),
        fingerprint=_fingerprint(config),
        kv_dtype=dtype if kv_dtype == "auto" else kv_dtype,
        settings=settings,
    )


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _served_name(model: Any) -> str:
    served = model.served_model_name
    return str(served[0] if isinstance(served, list) else served or model.model)


def _settings(config: VllmConfig) -> dict[str, str]:
    """Those that change what is computed, where they are set, by SGLang's names."""
    model, found = config.model_config, dict[str, str]()
    if model.quantization is not None and not _is_quantized_on_disk(model):
        # Quantized as it is loaded, by this engine's rules.
        found["quantization"] = f"vllm: {model.quantization}"
        found["quantization_config"] = f"vllm: {_plain(model.quantization_config)}"
    if isinstance(overrides := model.hf_overrides, dict) and overrides:
        found["json_model_override_args"] = json.dumps(overrides, sort_keys=True, default=repr)
    if str(model.config_format) not in CONFIG_FORMATS:
        found["config_format"] = f"vllm: {model.config_format}"
    load_format = _load_format(config)
    if load_format not in PLAIN_FORMATS:
        found["load_format"] = f"vllm: {load_format}"
    return found


def _plain(value: Any) -> str:
    """Settings as JSON, the same in each process."""
    return json.dumps(value, sort_keys=True, default=vars)


def _by_length(config: VllmConfig) -> dict[str, str]:
    """What vLLM computes otherwise where --max-model-len is longer, whatever the length of a prompt.

    LongRoPE has factors for short and long contexts (model_executor/layers/rotary_embedding/
    phi3_long_rope_scaled_rope.py); SGLang chooses by the positions of a batch, so it never has the same pages. Llama 4
    tunes its attention (models/llama4.py).
    """
    model = config.model_config
    text, found = model.hf_text_config, dict[str, str]()
    for rope in _ropes(text):
        if rope.get("rope_type", rope.get("type")) in LONG_ROPES:
            known = (text, "original_max_position_embeddings"), (text, "max_position_embeddings")
            own = rope.get("original_max_position_embeddings")
            short = own or next((n for n in (getattr(*each, None) for each in known) if n), 0)
            found["rope"] = f"vllm: for {_longer(model, short)}"
    if str(getattr(text, "model_type", "")).startswith("llama4"):
        tuned = (model.override_generation_config or {}).get("attn_temperature_tuning")
        found["attn_temperature_tuning"] = f"vllm: {tuned}, {_longer(model, LLAMA4_LONG)}"
    return found


def _longer(model: Any, length: int) -> str:
    """A length that is fitted to the memory is known only after the model was built for all that it can do."""
    if model.original_max_model_len == AUTO_LENGTH:
        return "auto"
    return "long" if model.max_model_len > length else "short"


def _ropes(text: Any) -> Iterator[Mapping[str, Any]]:
    """The RoPE settings of a model; of some there are several, one for each kind of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        given = getattr(text, name, None)
        if isinstance(given, Mapping):
            yield given
            yield from (each for each in given.values() if isinstance(each, Mapping))


def _draft(config: VllmConfig) -> dict[str, str]:
    """A draft model's layers share groups with the model's own, so pages are of both."""
    speculative = config.speculative_config
    model = getattr(speculative, "draft_model_config", None)
    if speculative is None or model is None or speculative.method in NO_DRAFT:
        return {}
    try:
        own = Source(str(model.model), model.revision).fingerprint()
    except OSError:
        own = str(model.model)
    return {"speculative_algorithm": f"vllm: {speculative.method}", "draft_fingerprint": own}


def _doubts(config: VllmConfig) -> list[str]:
    """Why the model's files do not say which weights, or which numbers of them, this engine has."""
    found, load_format = [], _load_format(config)
    if load_format not in FILE_FORMATS:
        found.append(
            f"--load-format {load_format} takes weights that are not those of the model's files"
        )
    if callable(config.model_config.hf_overrides):
        found.append("--hf-overrides is a function, and nothing says what it does")
    if config.model_config.hf_config_path is not None:
        found.append("--hf-config-path takes another configuration than the model's own")
    if getattr(config.cache_config, "calculate_kv_scales", False):
        found.append("--calculate-kv-scales gives each engine scales of its own")
    return found


def _changed(config: VllmConfig) -> list[str]:
    """Whether files may be others than were loaded: changed since this process began, which was before it loaded them.

    Not those of the hub's cache: it keeps each version apart, and may have been filled just now.
    """
    import psutil

    path = Path(str(config.model_config.model))
    sight = Source(str(path)).sight() if path.exists() else None
    begun = psutil.Process().create_time() * 1e9
    if sight and max(change for *_, change in sight) > begun:
        return [f"what lies at {path} was changed while this engine started (restart it)"]
    return []


def _load_format(config: VllmConfig) -> str:
    given = config.load_config.load_format
    return str(getattr(given, "value", given))


def _is_quantized_on_disk(model: Any) -> bool:
    """The files say so, and their fingerprint with them."""
    return getattr(model.hf_config, "quantization_config", None) is not None


def _fingerprint(config: VllmConfig) -> str:
    model = config.model_config
    source = Source(str(model.model), model.revision, config.load_config.download_dir)
    try:
        return source.fingerprint()
    except OSError as error:
        _warn(f"the weights of {source.path} cannot be looked at ({error})")
        return f"{UNREAD}{uuid4().hex}"


def _warn(doubt: str) -> None:
    logger.warning("lmcache: %s: pages are for this engine only, and cold after a restart", doubt)
