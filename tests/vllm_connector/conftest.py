"""One group of a small model, and an open store for its pages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lmcache_sglang.config import Config
from lmcache_sglang.hicache.identity import ModelIdentity
from lmcache_sglang.storage.chain import Chain
from lmcache_sglang.store import open_chain
from lmcache_sglang.vllm_connector.groups import Group, Topology
from lmcache_sglang.vllm_connector.knowledge import Knowledge

LAYERS, HEADS, DIM, BLOCK, PAGE, BLOCKS = 2, 2, 8, 16, 32, 64
MODEL = ModelIdentity(name="m", fingerprint="f", kv_dtype="float32", settings={"dtype": "float32"})
GROUP = Group(
    number=0,
    pool="kv",
    layer_names=("layers.0", "layers.1"),
    layers=(0, LAYERS),
    block_size=BLOCK,
    head_dims=(DIM, DIM),
    named_dims=(DIM, DIM),
    latent=False,
    dtype="float32",
    itemsize=4,
    window=0,
)


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[Chain]:
    settings = {
        "path": str(tmp_path / "store"),
        "cpu": {"size": "16MiB", "path": str(tmp_path / "memory")},
        "disk": {"size": 0},
    }
    opened = open_chain(Config.of(settings))
    yield opened
    opened.close()


@pytest.fixture
def knowledge(chain: Chain) -> Knowledge:
    return Knowledge(MODEL, [GROUP], Topology(1, HEADS), PAGE, chain)


@pytest.fixture
def layers() -> list[torch.Tensor]:
    """The blocks, as views [block, head, token, K and V]."""
    return list(torch.randn(LAYERS, BLOCKS, HEADS, BLOCK, 2 * DIM))
