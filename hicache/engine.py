"""What the running SGLang says of its model, in the scheduler's process."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import msgspec

from . import weights
from .identity import UNREAD, ModelIdentity, fingerprint

logger = logging.getLogger(__name__)

# Settings that change what a model computes, beside its files.
_SETTINGS = (
    "dtype",
    "quantization",
    "quantization_param_path",
    "json_model_override_args",
    "model_loader_extra_config",
    "modelopt_quant",
    "quantize_and_serve",
    "rl_quant_profile",
)
_DRAFT_SETTINGS = (
    "speculative_algorithm",
    "speculative_draft_load_format",
    "speculative_draft_model_quantization",
    "speculative_draft_kv_cache_dtype",
    "speculative_draft_window_size",
    "speculative_draft_sink_size",
)
# Ways of loading that give the weights of the model's files as they are.
_PLAIN_FORMATS = ("auto", "safetensors", "pt", "gguf", "mistral", "npcache", "fastsafetensors")


def model_identity(served_name: str | None) -> ModelIdentity:
    """The identity of the model this process serves.

    Args:
        served_name: as SGLang gives it to storage backends; it carries the host pool's format tag.
    """
    from sglang.srt.runtime_context import get_model

    model = get_model()
    settings = {name: str(getattr(model, name)) for name in _SETTINGS}
    if weights.epoch():
        settings["weights"] = weights.epoch()
    load_format = str(getattr(model.load_format, "value", model.load_format))
    if load_format not in _PLAIN_FORMATS:  # dummy, say: random weights, whatever the files hold
        settings["load_format"] = load_format
    return ModelIdentity(
        name=served_name or str(model.model_path),
        fingerprint=_fingerprint(str(model.model_path), model.revision),
        kv_dtype=str(model.kv_cache_dtype),
        settings=settings,
    )


def draft_identity(target: ModelIdentity) -> ModelIdentity | None:
    """The identity of the draft model of speculative decoding; None without one.

    Its KV is made of the target's hidden states too, so it names both.
    """
    from sglang.srt.runtime_context import get_spec

    spec = get_spec()
    if spec.speculative_algorithm is None:
        return None
    settings = {name: str(getattr(spec, name)) for name in _DRAFT_SETTINGS}
    path, revision = spec.speculative_draft_model_path, spec.speculative_draft_model_revision
    own = (
        _fingerprint(str(path), revision) if path else "within the target"
    )  # layers of its own files
    settings |= {"draft_fingerprint": own}
    fingerprints = target.fingerprint, own
    unread = next((each for each in fingerprints if each.startswith(UNREAD)), target.fingerprint)
    return msgspec.structs.replace(target, fingerprint=unread, settings=target.settings | settings)


def keeps_pages() -> bool:
    """Whether SGLang's host pool keeps pages, and not only such as are on their way (`buffer_only`).

    Where it does not, SGLang takes a lookup's answer for what the store has, and stores anew what is not in it.
    """
    from sglang.srt.runtime_context import get_memory

    return str(get_memory().hicache_host_memory_mode) != "buffer_only"


def kv_heads() -> int:
    """KV heads of the model that this process serves; 0 where SGLang does not say."""
    from sglang.srt.runtime_context import process_model_config

    return int(process_model_config().get_total_num_kv_heads() or 0)


def adapter_id(named: str, path: str) -> str:
    """The id of a LoRA adapter for page hashes, telling apart what was trained anew under one path.

    Args:
        named: SGLang's own id, which knows the adapter's name and path only.
        path: where the adapter is.
    """
    return hashlib.sha256(f"{named}\0{_fingerprint(path, None)}".encode()).hexdigest()[:32]


def _fingerprint(model_path: str, revision: str | None) -> str:
    try:
        return fingerprint(_local(model_path, revision))
    except OSError as error:
        logger.warning(
            "lmcache: the weights of %s cannot be looked at (%s), so nobody could tell them from others: "
            "its pages are for this engine only, and cold after a restart",
            model_path,
            error,
        )
        return f"{UNREAD}{weights.temporary()}"


def _local(model_path: str, revision: str | None) -> Path:
    """Where the model's files are. Raises OSError when they are not on this machine."""
    path = Path(model_path)
    if path.exists():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model_path, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise OSError(str(error)) from error
