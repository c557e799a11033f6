"""`sglang.Engine(...)` takes the flag as an argument; nobody parses a command line for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from lmcache_sglang.testing.engine import (
    CPU_ENVIRONMENT,
    PAGE_SIZE,
    Setup,
    pages_on_disk,
    prompt,
    until,
    whole_pages,
)

FIRST = prompt(1)

# `shutdown` kills the scheduler, so the program waits on its input until the pages are on the disk.
PROGRAM = """
import json, sys
from sglang import Engine

def main():
    model, extra, prompt = json.loads(sys.argv[1])
    engine = Engine(
        model_path=model, device="cpu", dtype="float32", page_size=16, max_total_tokens=2048,
        hicache_storage_backend="lmcache", hicache_storage_backend_extra_config=extra,
        log_level="error",
    )
    answer = engine.generate(
        input_ids=prompt, sampling_params={"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    )
    print("ANSWER", json.dumps([answer["output_ids"], answer["meta_info"]["cached_tokens_details"]]),
          flush=True)
    sys.stdin.readline()
    engine.shutdown()

if __name__ == "__main__":
    main()
"""


def test_an_engine_restores_what_the_one_before_it_stored(model: Path, folder: Path) -> None:
    setup = Setup(folder / "store")
    (folder / "program.py").write_text(PROGRAM)
    tokens, cached = run(folder, model, setup)
    setup.forget_memory()
    assert not cached or cached["storage"] == 0
    again, cached = run(folder, model, setup)
    assert again == tokens
    assert cached["storage"] == whole_pages(FIRST)
    assert cached["storage_backend"] == "lmcache"


def run(folder: Path, model: Path, setup: Setup) -> tuple[list[int], dict[str, Any]]:
    arguments = json.dumps([str(model), setup.extra_config, FIRST])
    with (
        (folder / "engine.log").open("a") as log,
        subprocess.Popen(
            [sys.executable, str(folder / "program.py"), arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | CPU_ENVIRONMENT,
            start_new_session=True,
        ) as program,
    ):
        assert program.stdin is not None and program.stdout is not None
        lines = (line for line in program.stdout if line.startswith("ANSWER "))
        answer = next(lines, "").removeprefix("ANSWER ")
        assert answer, (folder / "engine.log").read_text()[-4000:]
        until(lambda: pages_on_disk(setup) >= len(FIRST) // PAGE_SIZE)
        program.stdin.write("go\n")
        program.stdin.close()
    tokens, cached = json.loads(answer)
    return tokens, cached
