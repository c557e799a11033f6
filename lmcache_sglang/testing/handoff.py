"""What a prefill instance hands to a decode instance, for a machine where none of SGLang's transfers runs.

SGLang's `fake` transfer moves no KV: the decode instance serves from prompts that nobody computed. Here
the whole pages of the prompt come from the decode instance's own storage backend instead, where an engine
that prefilled left them. All else is SGLang's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .plugin_folder import make_plugin

_COMMIT = "sglang.srt.disaggregation.decode.DecodeTransferQueue._commit_transfer_to_req"


def environment(folder: Path) -> dict[str, str]:
    """Of a decode instance that gets its prompts so."""
    code = "from lmcache_sglang.testing.handoff import activate\nactivate()"
    return make_plugin(folder, "lmcache_handoff", code)


def activate() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(_COMMIT, _bring_the_prompt, HookType.BEFORE)


def _bring_the_prompt(queue: Any, decode_req: Any) -> None:
    """Before the first step. What is not in the store is left as it is: SGLang's own first request."""
    manager = queue.scheduler.decode_offload_manager
    controller, host, request = (
        manager.cache_controller,
        manager.decode_host_mem_pool,
        decode_req.req,
    )
    tokens = request.origin_input_ids[: manager._prefill_offloaded_len(request)]
    hashes = manager._compute_prefix_hash(request, tokens)
    if controller.storage_backend.batch_exists(hashes) < len(hashes) or not hashes:
        return
    places = host.alloc(len(tokens))
    if not all(controller.storage_backend.batch_get_v1(hashes, places)):
        raise RuntimeError(f"the prompt of {request.rid} went from the store")
    row = queue.scheduler.req_to_token_pool.req_to_token[request.kv.req_pool_idx]
    slots = row[: len(tokens)].long()
    for layer in range(host.layer_num):
        host.load_to_device_per_layer(manager.kv_cache, places, slots, layer, controller.io_backend)
    host.free(places)
