"""SGLang on CPU: what is asked for is there, and nothing happens that was not asked for."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

import lmcache_sglang
from lmcache_sglang.testing.sglang_cpu.config import VARIABLE
from lmcache_sglang.testing.sglang_cpu.install import (
    PTH_LINE,
    PTH_NAME,
    install,
    status,
    uninstall,
)

ROOT = Path(lmcache_sglang.__file__).parents[1]

ENGINE_SCRIPT = """
from sglang import Engine
if __name__ == "__main__":
    engine = Engine(
        model_path={model!r}, device="cpu", enable_hierarchical_cache=True, page_size=16
    )
    sampling = dict(temperature=0, max_new_tokens=8, ignore_eos=True)
    for _ in range(2):
        print(engine.generate("the quick brown fox " * 40, sampling)["output_ids"])
    engine.shutdown()
"""


def test_installing_twice_is_installing_once(tmp_path: Path) -> None:
    assert status(tmp_path).startswith("not installed")
    assert install(tmp_path).startswith("wrote")
    assert "already" in install(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [PTH_NAME]
    assert status(tmp_path).startswith("installed")


def test_uninstalling_leaves_nothing(tmp_path: Path) -> None:
    install(tmp_path)
    assert uninstall(tmp_path).startswith("removed")
    assert "not there" in uninstall(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_of_an_older_version_is_replaced(tmp_path: Path) -> None:
    (tmp_path / PTH_NAME).write_text("import os\n")
    assert status(tmp_path).startswith("outdated")
    install(tmp_path)
    assert (tmp_path / PTH_NAME).read_text() == PTH_LINE


def test_python_reads_only_one_line() -> None:
    assert PTH_LINE.startswith("import ")
    assert PTH_LINE.index("\n") == len(PTH_LINE) - 1


def test_without_the_variable_nothing_is_imported_or_changed(tmp_path: Path) -> None:
    install(tmp_path)
    code = f"""
        import site, sys
        before = list(sys.meta_path)
        site.addsitedir({str(tmp_path)!r})
        assert sys.meta_path == before
        assert "lmcache_sglang" not in sys.modules
        from lmcache_sglang.testing.sglang_cpu.plugin import activate
        activate()
        assert not {{"torch", "sglang"}} & set(sys.modules)
        assert sys.meta_path == before
    """
    assert _python(code, PYTHONPATH=str(ROOT)) == ""


def test_with_the_variable_the_stand_ins_are_importable_and_only_that(tmp_path: Path) -> None:
    install(tmp_path)
    code = f"""
        import site
        site.addsitedir({str(tmp_path)!r})
        import torchvision.transforms as transforms
        from torchvision.transforms.functional import InterpolationMode
        class Derived(transforms.Compose): ...
        annotation = InterpolationMode.BICUBIC | None
        for call in (Derived, transforms.Compose, InterpolationMode.BICUBIC.value):
            try: call()
            except NotImplementedError as error: print(error.args[0].split(" is ")[0])
        from sgl_kernel import some_op_cpu
        for line in ("from sgl_kernel import some_op", "import sgl_kernel.kvcacheio"):
            try: exec(line)
            except ImportError: print("no:", line)
    """
    assert _python(code, PYTHONPATH=str(ROOT), **{VARIABLE: "1"}).splitlines() == [
        "__main__.Derived",
        "torchvision.transforms.Compose",
        "torchvision.transforms.functional.InterpolationMode.BICUBIC.value",
        "no: from sgl_kernel import some_op",
        "no: import sgl_kernel.kvcacheio",
    ]


def test_python_still_starts_where_the_package_was_removed(tmp_path: Path) -> None:
    install(tmp_path)
    code = f"""
        import site, sys
        site.addsitedir({str(tmp_path)!r})
        print("lmcache_sglang" in sys.modules)
    """
    assert _python(code, "-I", "-S", **{VARIABLE: "1"}) == "False\n"


@pytest.mark.engine
@pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs SGLang for CPU")
def test_the_real_engine_runs_with_the_variable_alone(tmp_path: Path) -> None:
    from lmcache_sglang.testing.tiny_model import make_tiny_llama

    model = str(make_tiny_llama(tmp_path / "tiny"))
    script = tmp_path / "script.py"  # a file: SGLang's children import the main module again
    script.write_text(ENGINE_SCRIPT.format(model=model))
    run = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {VARIABLE: "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    cold, warm = (json.loads(line) for line in run.stdout.splitlines() if line.startswith("["))
    assert len(cold) == 8
    assert cold == warm


def _python(code: str, *options: str, **env: str) -> str:
    """What a fresh interpreter prints; it inherits no variable of ours and must not complain."""
    run = subprocess.run(
        [sys.executable, *options, "-c", dedent(code)],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    return run.stdout
