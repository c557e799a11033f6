"""The connector by its name alone, which `MultiConnector` needs. vLLM calls `register` in each of its processes."""

from __future__ import annotations

NAME = "LMCacheSGLangConnector"
_MODULE = "lmcache_sglang.connector"


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``. Imports nothing of the connector: few engines use it."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, _MODULE, NAME)
