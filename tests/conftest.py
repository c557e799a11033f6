"""What tests of several folders need."""

from __future__ import annotations

import ctypes
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec

import pytest

from lmcache_sglang.testing.sglang_cpu.config import VARIABLE
from lmcache_sglang.testing.sglang_cpu.finder import install


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
