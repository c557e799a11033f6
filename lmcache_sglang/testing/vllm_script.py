"""A real vLLM in this process, as a test's script (JSON, on stdin) says; what came of it goes to a file, as JSON.

    python -m lmcache_sglang.testing.vllm_script RESULT < script

vllm.py writes the scripts, and describes the steps.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def generate(llm: Any, step: dict[str, Any]) -> list[dict[str, Any]]:
    prompts = [{"prompt_token_ids": tokens, **step.get("more", {})} for tokens in step["prompts"]]
    adapter = _adapter(step["lora"]) if "lora" in step else None
    outputs = llm.generate(prompts, _sampling(step), use_tqdm=False, lora_request=adapter)
    return [_told(each) for each in outputs]


def abort(llm: Any, step: dict[str, Any]) -> list[dict[str, Any]]:
    """Ask, and give up after so many steps of the engine; what is left is stepped until there is nothing to do."""
    engine = llm.llm_engine
    for number, tokens in enumerate(step["prompts"]):
        engine.add_request(f"aborted-{number}", {"prompt_token_ids": tokens}, _sampling(step))
    for _ in range(step["after"]):
        engine.step()
    engine.abort_request([f"aborted-{number}" for number in range(len(step["prompts"]))])
    return []


def reset(llm: Any, step: dict[str, Any]) -> bool:
    """vLLM's own cache, and the connector's if `connector` says so."""
    return bool(llm.reset_prefix_cache(reset_connector=step.get("connector", False)))


def reload(llm: Any, step: dict[str, Any]) -> None:
    """Other weights into the running model."""
    llm.collective_rpc("reload_weights", kwargs={"weights_path": step["path"]})


def wait(llm: Any, step: dict[str, Any]) -> None:
    time.sleep(step["seconds"])


def metrics(llm: Any, step: dict[str, Any]) -> dict[str, Any]:
    return {each.name: getattr(each, "value", None) for each in llm.get_metrics()}


STEPS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "generate": generate,
    "abort": abort,
    "reset": reset,
    "reload": reload,
    "wait": wait,
    "metrics": metrics,
}


def _adapter(given: dict[str, Any]) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(given["name"], given["id"], given["path"])


def _sampling(step: dict[str, Any]) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0, max_tokens=step["new_tokens"], detokenize=False, ignore_eos=True
    )


def _told(output: Any) -> dict[str, Any]:
    (answer,) = output.outputs
    return {
        "tokens": list(answer.token_ids),
        "cached": output.num_cached_tokens or 0,
        "finish": answer.finish_reason,
    }


def main() -> None:
    from vllm import LLM

    script = json.load(sys.stdin)
    llm = LLM(**script["llm"])
    results = [STEPS[step["do"]](llm, step) for step in script["steps"]]
    Path(sys.argv[1]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
