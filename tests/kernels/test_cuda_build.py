"""The kernels as machine code: by NVRTC and by nvcc, for each architecture, without a GPU; and the cubins on disk.

Both compilers come with the tests' environment (lmcache_sglang/testing/sglang_cpu/requirements.txt). No test here runs a
kernel.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import triton

from lmcache_sglang.errors import CudaUnavailableError
from lmcache_sglang.kernels import _native
from lmcache_sglang.kernels.cuda import CudaCopier, build, compilers, sources
from lmcache_sglang.kernels.cuda import __main__ as command
from lmcache_sglang.kernels.cuda.compilers import Compiler, Nvcc, Nvrtc
from lmcache_sglang.kernels.cuda.cubins import Cubins

ARCHS = ["sm_80", "sm_90", "sm_100"]
MOST_REGISTERS = 64  # of a thread: 4 blocks of 256 threads fit an SM then, as choice.py reckons
COMPILERS: dict[str, Callable[[], Compiler]] = {"nvrtc": Nvrtc, "nvcc": Nvcc}


@pytest.fixture(params=COMPILERS)
def compiler(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@cache
def compiled(compiler: str, arch: str) -> bytes:
    return COMPILERS[compiler]().compile(arch)


def inspect(cubin: bytes, folder: Path, *options: str) -> str:
    """What cuobjdump, which Triton brings along, says of a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    file = folder / "kernels.cubin"
    file.write_bytes(cubin)
    arguments = [str(tool), *options, str(file)]
    return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout


def resources(cubin: bytes, folder: Path) -> dict[str, dict[str, int]]:
    """Of each kernel: registers, bytes of stack, and so on."""
    text = inspect(cubin, folder, "-res-usage")
    found = re.findall(r"Function (\w+):\s+(REG:.*)", text)
    return {
        name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
        for name, usage in found
    }


def instructions(cubin: bytes, folder: Path) -> dict[str, list[str]]:
    """Of each kernel the names of its instructions, in order."""
    text = inspect(cubin, folder, "-sass")
    made = {}
    for part in text.split("Function : ")[1:]:
        names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]+)", part)
        made[part.split()[0]] = names
    return made


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_keeps_to_registers(
    compiler: str, arch: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """No local memory, no stack, and few enough registers that an SM is full of threads."""
    used = resources(compiled(compiler, arch), tmp_path)
    assert sorted(used) == _native.kernels()
    for name, usage in used.items():
        record_property(f"registers by {compiler} for {arch} of {name}", usage["REG"])
        assert (usage["STACK"], usage["LOCAL"], usage["SHARED"]) == (0, 0, 0)
        assert usage["REG"] <= MOST_REGISTERS


@pytest.mark.parametrize("arch", ARCHS)
def test_no_kernel_touches_local_memory(compiler: str, arch: str, tmp_path: Path) -> None:
    code = instructions(compiled(compiler, arch), tmp_path)
    assert sorted(code) == _native.kernels()
    assert all(len(names) > 50 for names in code.values())
    spilled = [name for names in code.values() for name in names if name[:3] in ("LDL", "STL")]
    assert not spilled


@pytest.mark.parametrize("arch", ARCHS)
def test_words_of_16_bytes_are_moved_whole(compiler: str, arch: str, tmp_path: Path) -> None:
    """By global loads and stores of 128 bits, four of them under way before the first is stored."""
    names = instructions(compiled(compiler, arch), tmp_path)["lmcache_copy_16"]
    moves = [name[:3] for name in names if re.match(r"(LDG|STG)\.E\b.*\.128", name)]
    assert moves.index("STG") >= 4
    assert moves.count("STG") >= 4
    assert not [name for name in names if re.match(r"STG?\b", name) and ".128" not in name]


@pytest.mark.parametrize("arch", ARCHS)
def test_conversions_read_and_write_eight_numbers_at_once(
    compiler: str, arch: str, tmp_path: Path
) -> None:
    code = instructions(compiled(compiler, arch), tmp_path)
    for dtype in ["bf16", "fp16"]:
        there, back = code[f"lmcache_quantize_{dtype}_8"], code[f"lmcache_dequantize_{dtype}_8"]
        assert any(name.startswith("LDG.E") and ".128" in name for name in there)
        assert any(name.startswith("STG.E") and ".64" in name for name in there)
        assert any(name.startswith("SHFL.BFLY") for name in there)
        assert any(name.startswith("STG.E") and ".128" in name for name in back)


def test_the_shipped_headers_are_those_that_are_included() -> None:
    needed, seen = [sources.KERNELS], set()
    while needed:
        name = needed.pop()
        if name not in seen:
            seen.add(name)
            needed += re.findall(r'#include "(.*)"', sources.text(name).decode())
    assert seen == {sources.KERNELS, *sources.HEADERS}


# Cubins on disk.


def forbid_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_nothing(_: object, arch: str) -> bytes:
        raise AssertionError(f"compiled for {arch}")

    monkeypatch.setattr(Nvrtc, "compile", compile_nothing)
    monkeypatch.setattr(Nvcc, "compile", compile_nothing)


def test_the_second_use_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build.cubin_for("sm_90", tmp_path)
    assert first.compiled
    forbid_compiling(monkeypatch)
    again = build.cubin_for("sm_90", tmp_path)
    assert (again.cubin, again.source, again.compiled) == (first.cubin, first.source, False)


def test_each_architecture_has_its_own(tmp_path: Path) -> None:
    made = [build.cubin_for(arch, tmp_path) for arch in ["sm_80", "sm_90"]]
    assert all(each.compiled for each in made)
    assert len(list(tmp_path.iterdir())) == 2


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "a bit": lambda whole: whole[:-1] + bytes([whole[-1] ^ 1]),
    "cut off": lambda whole: whole[: len(whole) // 2],
    "empty": lambda _: b"",
    "something else": lambda whole: b"x" * len(whole),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_one_is_made_again(what: str, tmp_path: Path) -> None:
    first = build.cubin_for("sm_90", tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(DAMAGE[what](whole))
    again = build.cubin_for("sm_90", tmp_path)
    assert again.compiled
    assert again.cubin == first.cubin
    assert file.read_bytes() == whole


def test_a_change_of_the_source_makes_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build.cubin_for("sm_90", tmp_path)
    monkeypatch.setattr(sources, "digest", lambda: "another")
    assert build.cubin_for("sm_90", tmp_path).compiled


def test_a_folder_that_cannot_be_written_only_costs_time(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert build.cubin_for("sm_90", tmp_path / "file").compiled


def test_a_crash_leaves_no_half_a_cubin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="full"):
        Cubins(tmp_path).keep("sm_90", "nvrtc-1.0", b"cubin")
    assert list(tmp_path.iterdir()) == []


def test_of_several_the_newest_is_taken(tmp_path: Path) -> None:
    kept = Cubins(tmp_path)
    for version in ["13.9.1", "13.10.0", "9.2"]:
        kept.keep("sm_90", f"nvcc-{version}", version.encode())
    assert list(kept.find_all("sm_90", "nvcc-*")) == [b"13.10.0", b"13.9.1", b"9.2"]
    assert build.cubin_for("sm_90", tmp_path).cubin == b"13.10.0"


def test_one_that_is_not_accepted_gives_way_to_the_next(tmp_path: Path) -> None:
    Cubins(tmp_path).keep("sm_90", "nvcc-99.0", b"too new")

    def accept(built: build.Built) -> None:
        if built.cubin == b"too new":
            raise CudaUnavailableError("the driver is older")

    assert build.cubin_for("sm_90", tmp_path, accept).source.startswith("nvrtc")


def test_whoever_serves_may_read_what_another_user_built(tmp_path: Path) -> None:
    path = Cubins(tmp_path / "cubins").keep("sm_90", "nvcc-13.0", b"cubin")
    assert path.stat().st_mode & 0o777 == 0o644
    assert path.parent.stat().st_mode & 0o055 == 0o055 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_what_was_built_ahead_is_taken_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--arch", "sm_80", "--arch", "sm_90", "--into", str(tmp_path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    forbid_compiling(monkeypatch)
    built = build.cubin_for("sm_90", tmp_path)
    assert (built.source, built.compiled) == ("nvcc, ahead of time", False)
    assert built.cubin == compiled("nvcc", "sm_90")


def test_the_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arch in [
        "90",
        "sm_90a",
        "sm_100f",
    ]:  # a GPU's own name has no letter, and finds no such cubin
        with pytest.raises(SystemExit):
            command.main(["--arch", arch, "--into", str(tmp_path)])
        assert f"{arch!r} is not like sm_90" in capsys.readouterr().err
    given = ["--arch", "sm_10", "--into", str(tmp_path), "--compiler", "nvrtc"]
    assert command.main(given) == 1
    assert "knows no sm_10, only sm_75" in capsys.readouterr().err


# Where something is missing.


def test_an_unknown_architecture_names_the_known_ones() -> None:
    with pytest.raises(CudaUnavailableError, match=r"knows no sm_999, only .*sm_90"):
        Nvrtc().compile("sm_999")


def test_source_that_does_not_compile_shows_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "text", lambda _: b"no C++\0")
    with pytest.raises(CudaUnavailableError, match="error"):
        Nvrtc().compile("sm_90")


def test_without_either_compiler_both_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(compilers, "NVCC_PACKAGE", "no-such-package")
    with pytest.raises(CudaUnavailableError, match=r"pip install cuda-python.*CUDA toolkit"):
        build.cubin_for("sm_90", tmp_path)


def test_bindings_without_nvrtc_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_no_library() -> None:
        raise RuntimeError("Failed to dlopen libnvrtc.so.13")

    monkeypatch.setattr("cuda.bindings.nvrtc.nvrtcVersion", find_no_library)
    with pytest.raises(CudaUnavailableError, match=r"pip install nvidia-cuda-nvrtc .*libnvrtc"):
        Nvrtc()


def test_nvcc_of_a_package_is_found_where_none_is_on_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilers, "_nvcc_on_path", lambda: None)
    nvcc = Nvcc()
    assert nvcc.name == "nvcc-13.0.88"
    assert sorted(resources(nvcc.compile("sm_90"), tmp_path)) == _native.kernels()


def test_a_log_of_one_byte_is_written_to_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python has one object for all bytes of length 1, and NVRTC writes into the one that it is given."""
    nvrtc, given = Nvrtc(), list[bytes]()
    monkeypatch.setattr(nvrtc, "_call", lambda _name, _program, room: given.append(room))
    assert nvrtc._written("nvrtcGetProgramLog", None, 1) == b"\0"
    assert not any(given[0] is bytes([number]) for number in range(256))


def test_nvcc_that_is_none_is_said(tmp_path: Path) -> None:
    with pytest.raises(CudaUnavailableError, match="nothing here"):
        Nvcc(tmp_path / "nothing here")


def test_without_bindings_there_is_no_copier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(CudaUnavailableError, match=re.escape(compilers.NO_BINDINGS)):
        CudaCopier(0, cubins=tmp_path)


def test_importing_it_imports_neither_torch_nor_cuda() -> None:
    code = "import sys, lmcache_sglang.kernels.cuda; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert not {"torch", "cuda", "numpy"} & set(loaded)
