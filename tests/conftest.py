"""What tests of several folders need."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from lmcache_sglang import config as config_module
from lmcache_sglang.storage.slab.filesystem import mount_of, why_not
from lmcache_sglang.testing.engine import MEMORY
from lmcache_sglang.testing.sglang_cpu.config import VARIABLE
from lmcache_sglang.testing.sglang_cpu.finder import install
from lmcache_sglang.testing.tiny_model import make_tiny_llama

SHARED_MEMORY = Path("/dev/shm")


def pytest_configure() -> None:
    """Temporary folders on a mount that a store refuses, a container's own layer say, go to memory."""
    temporary = Path(os.environ.get("PYTEST_DEBUG_TEMPROOT") or tempfile.gettempdir())
    if why_not(mount_of(temporary)) is not None:
        os.environ["PYTEST_DEBUG_TEMPROOT"] = str(SHARED_MEMORY)


@pytest.fixture(autouse=True)
def shared_memory() -> Iterator[Path]:
    """Where CPU tiers of this process lie that are told no other place; removed after the test.

    Stores of other tests, or of engines that really serve on this machine, are never met here.
    """
    folder = Path(tempfile.mkdtemp(prefix="lmcache-test-", dir=SHARED_MEMORY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config_module, "SHARED_MEMORY", folder)
        yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For real engines: a tiny Llama in float32: bfloat16 may flip a token with the batch."""
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "one", seed=1, dtype="float32")


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Path]:
    """A folder for the stores and logs of one test file, whose CPU tiers are removed after it."""
    yield tmp_path_factory.mktemp(Path(str(request.path)).stem)
    shutil.rmtree(MEMORY, ignore_errors=True)


@pytest.fixture(scope="session")
def sglang() -> Iterator[None]:
    """SGLang can be imported. Its imports on CPU stand on this variable and on these stand-ins.

    Processes of the project's environment have both from their start; here it may be too late.
    """
    if find_spec("sglang") is None:
        pytest.skip("SGLang is not installed here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "1")
        install()
        with warnings.catch_warnings(action="ignore"):  # torch's and SGLang's own, of their imports
            import_module("sglang.srt.layers.attention.torch_native_backend")
            import_module("sglang.srt.mem_cache.memory_pool_host")
            import_module("sglang.srt.mem_cache.storage")
        yield


def pytest_unconfigure() -> None:
    """Never free what SWIG shares between its modules.

    SGLang imports sentencepiece 0.2.1, whose bindings free it after their own types are gone: the
    interpreter then ends with SIGSEGV, although every test has passed.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith("swig_runtime_data"):
            for shared in vars(module).values():
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(shared))
