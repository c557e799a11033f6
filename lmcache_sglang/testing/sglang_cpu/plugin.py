"""What SGLang is given while it runs on CPU, through its own plug-in interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lmcache_sglang.testing.sglang_cpu.config import active
from lmcache_sglang.testing.sglang_cpu.finder import installed

# Two full contexts of the tiny model in 32 MiB; 288 MiB for one with 18 KiB a token. HiCache's host
# pool is twice as large.
DEFAULT_POOL_TOKENS = 16384
DEFAULT_POOL_STATES = 64  # of recurrent layers, on the device
HOST_RESERVE_BYTES = 1 << 30


def activate() -> None:
    """Entry point of the group `sglang.srt.plugins`: SGLang calls it first in each of its processes.

    Imports nothing and changes nothing unless SGLang runs on CPU in an environment where the stand-ins
    were installed: who serves on CPUs with SGLang's own kernels is left alone. What the user chose
    stands.
    """
    if active() and installed():
        offer_transfers()
        _lower_the_reserve()
        _register_hooks()


def offer_transfers() -> None:
    """Without them the first copy of a page fails with a NameError (in pool_host/mha.py:647, say).

    The modules of the host pools take them from sgl_kernel on CUDA, HIP and XPU only.
    """
    from sglang.srt.mem_cache.pool_host import dsa, mamba, mha, mla

    from lmcache_sglang.testing.sglang_cpu import transfer

    operations = {name: op for name, op in vars(transfer).items() if name.startswith("transfer_")}
    for module in (mha, mla, mamba, dsa):
        for name, operation in operations.items():
            if not hasattr(module, name):
                setattr(module, name, operation)


def _lower_the_reserve() -> None:
    """Without it HiCache needs ten free gigabytes beside its pool: pool_host/base.py:252 refuses."""
    from sglang.srt.mem_cache.pool_host import base

    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = HOST_RESERVE_BYTES


def _register_hooks() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    # Without it pool_host/common.py:147 asks CUDA to pin the host pool: "Torch not compiled with
    # CUDA enabled". Every concrete pool passes pin_memory, True unless told otherwise, by keyword; the
    # one of recurrent states does not pass it on, and makes itself.
    for pool in ("base.HostKVCache", "mamba.MambaPoolHost"):
        where = f"sglang.srt.mem_cache.pool_host.{pool}.__init__"
        HookRegistry.register(where, _without_pinning, HookType.BEFORE)

    # Without it the device pool takes seven tenths of the machine's memory and leaves none for
    # HiCache's host pool: hicache_auto_size.py:109, "No host memory is left for HiCache".
    resolve = "sglang.srt.server_args.ServerArgs.resolve_once"
    HookRegistry.register(resolve, _with_a_small_pool, HookType.BEFORE)

    # Without it utils/numa_utils.py:463 refuses more ranks than NUMA nodes, hence tensor
    # parallelism on a small machine.
    bind = "sglang.srt.utils.numa_utils.init_threads_binding"
    HookRegistry.register(bind, _bind_where_it_counts, HookType.AROUND)

    # Without it torch_native_backend.py computes the attention of cached tokens again: a hit on 4,300
    # tokens costs 6.3 s instead of 0.4, and no time measured on CPU says anything about the cache.
    # And it reads layers with a sliding window from the slots of the other layers' pool.
    from lmcache_sglang.testing.sglang_cpu import attention

    HookRegistry.register(attention.EXTEND, attention.extend, HookType.AROUND)
    HookRegistry.register(attention.DECODE, attention.decode, HookType.AROUND)

    # Only where a model is about to run: importing what these change takes seconds.
    HookRegistry.register(attention.MADE, _offer_kernels, HookType.BEFORE)


def _offer_kernels(*_: Any, **__: Any) -> None:
    from lmcache_sglang.testing.sglang_cpu import latent_attention, recurrence

    latent_attention.absorb_always()
    recurrence.offer()


def _without_pinning(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs | {"pin_memory": False}


def _with_a_small_pool(server_args: Any) -> None:
    """Size the device pools where nobody did; a record that was resolved before is left alone."""
    if server_args.max_total_tokens is None and server_args.mem_fraction_static is None:
        server_args.max_total_tokens = DEFAULT_POOL_TOKENS
    if server_args.max_mamba_cache_size is None and server_args.mem_fraction_static is None:
        server_args.max_mamba_cache_size = DEFAULT_POOL_STATES


def _bind_where_it_counts(original: Callable[..., Any], **kwargs: Any) -> Any:
    """Without AMX kernels SGLang computes a rank's cores and does nothing with them."""
    from sglang.srt.utils import cpu_has_amx_support

    return original(**kwargs) if cpu_has_amx_support() else None
