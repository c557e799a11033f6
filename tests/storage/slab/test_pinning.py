"""Memory is made known to CUDA through the driver that is there. Here a small library stands in for it."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from lmcache_sglang.storage.slab.opening import Place
from lmcache_sglang.storage.slab.tier import SlabTier

SIZE = 4 << 20

DRIVER = """
static void *context; static int answer; static unsigned long registered; static int calls;
extern "C" {
void set(int with_context, int code) { context = with_context ? &context : nullptr; answer = code; }
int cuCtxGetCurrent(void **out) { *out = context; return 0; }
int cuMemHostRegister_v2(void *, unsigned long bytes, unsigned) {
  ++calls; if (answer == 0) registered += bytes; return answer; }
int cuMemHostUnregister(void *) { registered = 0; return 0; }
unsigned long registered_bytes() { return registered; }
int register_calls() { return calls; }
}
"""


@pytest.fixture
def driver(tmp_path: Path) -> str:
    source, library = tmp_path / "driver.cpp", tmp_path / "libdriver.so"
    source.write_text(DRIVER)
    subprocess.run(["c++", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return str(library)


@pytest.fixture
def tier(shared_memory: Path) -> Iterator[SlabTier]:
    with closing(SlabTier(Place(shared_memory, memory=True), SIZE)) as opened:
        yield opened


def test_the_whole_region_is_registered_once_and_given_back(tier: SlabTier, driver: str) -> None:
    library = ctypes.CDLL(driver)
    library.set(1, 0)
    assert tier.pin_memory(driver) == ""
    assert tier.pin_memory(driver) == ""
    assert library.registered_bytes() == tier.head.plan.region_bytes
    assert library.register_calls() == 1
    tier.close()
    assert library.registered_bytes() == 0


def test_what_is_in_the_way_is_told_and_tried_again(tier: SlabTier, driver: str) -> None:
    library = ctypes.CDLL(driver)
    library.set(0, 0)
    assert "no CUDA context" in tier.pin_memory(driver)
    library.set(1, 712)
    assert "712" in tier.pin_memory(driver)
    library.set(1, 0)
    assert tier.pin_memory(driver) == ""


def test_without_a_driver_nothing_is_pinned(tier: SlabTier, tmp_path: Path) -> None:
    assert "no CUDA driver" in tier.pin_memory(str(tmp_path / "libcuda.so.1"))
    assert "is no CUDA driver" in tier.pin_memory("libm.so.6")


def test_a_file_is_no_memory(tmp_path: Path) -> None:
    with closing(SlabTier(Place(tmp_path, memory=False), SIZE)) as on_disk:
        assert on_disk.pin_memory() == "it is no memory"
