"""LoRA adapters: the pages of each are its own, and whoever replaces an adapter's weights finds none of the old ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lmcache_sglang.testing import vllm
from lmcache_sglang.testing.tiny_adapter import make_tiny_adapter
from tests.vllm.answers import cached, tokens

Tokens = Sequence[Sequence[int]]


def test_pages_of_an_adapter_are_its_own(
    model: Path, folder: Path, prompts: Tokens, plain: Tokens
) -> None:
    paths = [make_tiny_adapter(folder / f"adapter-{seed}", model, seed=seed) for seed in (1, 2)]
    setup = vllm.Setup(
        model, folder / "adapters", llm={"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    )
    prompt = prompts[1]
    asked = [
        vllm.generate(prompt, lora={"name": f"adapter-{number}", "id": number, "path": str(path)})
        for number, path in enumerate(paths, 1)
    ]
    cold = vllm.run(setup, *asked, vllm.generate(prompt), log=folder / "cold.log")
    assert [cached(each) for each in cold] == [[0], [0], [0]]
    assert len({tuple(each[0]["tokens"]) for each in cold}) == 3, "each answers something else"
    assert tokens(cold[2]) == [plain[1]]

    renumbered = [
        vllm.generate(
            prompt, lora={"name": f"adapter-{number}", "id": 3 - number, "path": str(path)}
        )
        for number, path in enumerate(paths, 1)
    ]
    warm = vllm.run(setup, *renumbered, vllm.generate(prompt), log=folder / "warm.log")
    assert [cached(each) for each in warm] == [[192], [192], [192]]
    assert [tokens(each) for each in warm] == [tokens(each) for each in cold]

    make_tiny_adapter(paths[0], model, seed=3)
    replaced, other = vllm.run(setup, *asked, log=folder / "replaced.log")
    assert (cached(replaced), cached(other)) == ([0], [192])
    assert tokens(replaced) != tokens(cold[0])
    assert tokens(other) == tokens(cold[1])
