"""What the running SGLang says of its model, in the scheduler's process."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from . import sources, weights
from .identity import UNREAD, ModelIdentity
from .sources import Source

logger = logging.getLogger(__name__)

# Settings that change what a model computes, beside its files, where they are set: another engine has them by other names.
_SETTINGS = (
    "quantization",
    "quantization_param_path",
    "json_model_override_args",
    "model_loader_extra_config",
    "modelopt_quant",
    "quantize_and_serve",
    "rl_quant_profile",
)
_UNSET = (None, False, "", "{}")
_DRAFT_SETTINGS = (
    "speculative_algorithm",
    "speculative_draft_load_format",
    "speculative_draft_model_quantization",
    "speculative_draft_kv_cache_dtype",
    "speculative_draft_window_size",
    "speculative_draft_sink_size",
)
# SGLang's variables that give the same elements in another order.
_LAYOUTS = (
    "SGLANG_DSV4_KV_LAYOUT",
    "SGLANG_DSV4_COMPRESSED_KV_LAYOUT",
    "SGLANG_HIP_DSV41_INDEX_K_PAGE8",
)
# How experts are computed from the files of `kt_weight_path`, and which.
_KT_SETTINGS = ("kt_method", "kt_num_gpu_experts", "kt_max_deferred_experts_per_token")


def model_identity(served_name: str | None) -> ModelIdentity:
    """The identity of the model this process serves.

    Args:
        served_name: as SGLang gives it to storage backends; it carries the host pool's format tag.
    """
    from sglang.srt.runtime_context import get_model

    model = get_model()
    dtype = _computed_in()
    settings = {"dtype": dtype} | _set(model, _SETTINGS)
    load_format = sources.format_of(model.load_format)
    if load_format not in sources.PLAIN_FORMATS:
        settings["load_format"] = load_format
    doubts = list(sources.not_of_files())
    settings |= _beside(sources.beside_the_model(), doubts) | _experts() | _adapters(doubts)
    settings |= _layouts()
    fingerprint = _fingerprint(sources.of_model())
    doubts += _changed()  # last: what was read until now is what was loaded
    for doubt in doubts:
        _warn(doubt)
    if doubts or weights.epoch():
        settings["weights"] = weights.temporary()
    return ModelIdentity(
        name=served_name or str(model.model_path),
        fingerprint=fingerprint,
        kv_dtype=dtype if model.kv_cache_dtype == "auto" else str(model.kv_cache_dtype),
        settings=settings,
    )


def _computed_in() -> str:
    """The dtype that "auto" stands for."""
    from sglang.srt.runtime_context import process_model_config

    return str(process_model_config().dtype).removeprefix("torch.")


def _set(group: Any, names: Sequence[str]) -> dict[str, str]:
    """Those settings that are not as they are where nobody sets them."""
    values = {name: getattr(group, name) for name in names}
    return {name: str(value) for name, value in values.items() if value not in _UNSET}


def draft_identity(target: ModelIdentity) -> ModelIdentity | None:
    """The identity of the draft model of speculative decoding; None without one.

    Its KV is made of the target's hidden states too, so it names both.
    """
    from sglang.srt.runtime_context import get_spec

    spec = get_spec()
    if spec.speculative_algorithm is None:
        return None
    settings = {name: str(getattr(spec, name)) for name in _DRAFT_SETTINGS}
    source, doubts = sources.of_draft(), list[str]()
    settings |= _beside(sources.beside_the_draft(), doubts)
    own = _fingerprint(source) if source else "within the target"  # layers of its own files
    settings |= {"draft_fingerprint": own}
    doubts += [] if "weights" in target.settings else _changed()
    for doubt in doubts:
        _warn(doubt)
    if doubts or sources.draft_not_of_files():
        settings["weights"] = weights.temporary()
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

    SGLang's own where the adapter cannot be read: it may be downloaded only when it is loaded.

    Args:
        named: SGLang's own id, which knows the adapter's name and path only.
        path: where the adapter is.
    """
    try:
        return sources.with_weights(named, Source(path).fingerprint())
    except OSError:
        return named


def _adapters(doubts: list[str]) -> dict[str, str]:
    """Those whose id does not say which weights they have: their fingerprints.

    That is so where the store came without the flag, with the adapter's files, or on several nodes.
    """
    from sglang.srt.lora.lora_registry import LoRARef

    id_of = inspect.unwrap(LoRARef.deterministic_id)
    unknown = {}
    for adapter in sources.adapters():
        try:
            own = adapter.source.fingerprint()
        except OSError as error:
            doubts.append(f"the adapter {adapter.source.path} cannot be looked at ({error})")
            continue
        if adapter.id != sources.with_weights(id_of(adapter.name, adapter.source.path), own):
            unknown[adapter.id] = own
    listed = " ".join(f"{known}={unknown[known]}" for known in sorted(unknown))
    return {"adapters": listed} if listed else {}


def _beside(found: Mapping[str, Source], doubts: list[str]) -> dict[str, str]:
    """What lies at the paths of settings, instead of the paths."""
    known = {}
    for name, source in found.items():
        try:
            known[name] = source.fingerprint()
        except OSError as error:
            known[name] = UNREAD
            doubts.append(f"{source.path} ({name}) cannot be looked at ({error})")
    return known


def _experts() -> dict[str, str]:
    from sglang.srt.runtime_context import get_exec

    moe = get_exec().moe
    if not moe.kt_weight_path:
        return {}
    return {name: str(getattr(moe, name)) for name in _KT_SETTINGS}


def _layouts() -> dict[str, str]:
    """What decides how DeepSeek V4's elements lie: its host pools have the same shapes however they do.

    Nothing for other models, of which SGLang leaves the backend at "auto".
    """
    from sglang.srt.environ import envs
    from sglang.srt.runtime_context import get_exec

    backend = str(get_exec().kernel.dsv4_attn_backend)
    chosen = {} if backend == "auto" else {"dsv4_attn_backend": backend}
    variables = {name: getattr(envs, name) for name in _LAYOUTS}
    return chosen | {name: str(found.get()) for name, found in variables.items() if found.is_set()}


def _changed() -> list[str]:
    places = weights.changed(sources.seen)
    if not places:
        return []
    at = ", ".join(places)
    return [
        f"what lies at {at} is not what this engine loaded (restart it to serve and store that)"
    ]


def _warn(doubt: str) -> None:
    logger.warning("lmcache: %s: pages are for this engine only, and cold after a restart", doubt)


def _fingerprint(source: Source) -> str:
    try:
        return source.fingerprint()
    except OSError as error:
        logger.warning(
            "lmcache: the weights of %s cannot be looked at (%s), so nobody could tell them from others: "
            "its pages are for this engine only, and cold after a restart",
            source.path,
            error,
        )
        return f"{UNREAD}{weights.temporary()}"
