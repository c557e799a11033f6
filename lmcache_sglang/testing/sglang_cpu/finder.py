"""Importable stand-ins for `torchvision` and `sgl_kernel`, which SGLang imports and does not use.

`sglang.srt.multimodal.internvl_utils:5` imports torchvision for every model. Once the CPU is
chosen, `sglang.srt.mem_cache.allocation:46` and its like (`kernels/ops/kvcache/cache_move.py:10`,
`kernels/ops/speculative/*.py`) take names from sgl_kernel; a text model without speculative
decoding calls none of them. A stand-in can be imported, named in an annotation and derived from.
Calling it raises `NotImplementedError`.

The environment's .pth line imports this module when Python starts, before anything else: it stays
free of imports beyond the standard library's import system.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class Absent(type):
    """The metaclass of a name that stands for something which is not installed."""

    def __getattr__(cls, name: str) -> Absent:
        if _is_dunder(name):
            raise AttributeError(name)
        return absent(cls.__module__, f"{cls.__qualname__}.{name}")

    def __call__(cls, *args: object, **kwargs: object) -> object:
        name = f"{cls.__module__}.{cls.__qualname__}"
        raise NotImplementedError(f"{name} is only a stand-in: SGLang on CPU serves text models")


class StandIn(ModuleType):
    """A module that has every public name which ends in `suffix`."""

    __version__ = "0"  # transformers compares torchvision's as soon as SGLang imports it
    suffix: str

    def __getattr__(self, name: str) -> Absent:
        if _is_dunder(name) or not name.endswith(self.suffix):
            raise AttributeError(f"the stand-in for {self.__name__} has no {name}")
        return absent(self.__name__, name)


class StandInFinder(MetaPathFinder, Loader):
    """Finds one package and, where any name may be taken from it, all modules below it, too."""

    def __init__(self, package: str, suffix: str = "") -> None:
        self.package = package
        self.suffix = suffix

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        below = not self.suffix and fullname.startswith(self.package + ".")
        if fullname == self.package or below:
            return ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> StandIn:
        module = StandIn(spec.name)
        module.suffix = self.suffix
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


def install() -> None:
    """Put the stand-ins on the import path of this process, once.

    torchvision is shadowed even where it is installed: PyPI's build does not import beside a torch
    for CPU, and asking costs more than this path needs of it. An sgl_kernel that is installed was
    built for CPU by somebody's own hand, has AMX kernels, and wins. Its stand-in has the `_cpu`
    names only: for the others SGLang tries sgl_kernel first and takes torch on an ImportError.
    """
    if installed():
        return
    sys.meta_path.insert(0, StandInFinder("torchvision"))
    for package in ("sgl_kernel", "sgl_kernel.mamba"):
        sys.meta_path.append(StandInFinder(package, suffix="_cpu"))


def installed() -> bool:
    """Whether the stand-ins are on the import path of this process."""
    return any(isinstance(finder, StandInFinder) for finder in sys.meta_path)


def absent(module: str, qualname: str) -> Absent:
    """A stand-in of this name."""
    return Absent(qualname, (), {"__module__": module, "__qualname__": qualname})


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")
