"""The folders install under lmcache_sglang, never as names of their own, and import only what they may."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import files
from pathlib import Path

import pytest
from pathspec import GitIgnoreSpec  # scikit-build-core's own

from lmcache_sglang.kernels.cuda import sources

ROOT = Path(__file__).parents[1]
FOLDERS = ["hicache", "kernels", "storage", "vllm_connector"]
ENGINES = {"sglang", "vllm", "torch"}


def modules() -> list[Path]:
    """Every module of the package, where it lies in the repository."""
    found = {
        path.resolve()
        for folder in ("lmcache_sglang", *FOLDERS)
        for path in (ROOT / folder).rglob("*.py")
    }
    assert len(found) > 10
    return sorted(path.relative_to(ROOT) for path in found)


def product() -> list[Path]:
    return [path for path in modules() if "testing" not in path.parts]


def imports(path: Path) -> Iterator[str]:
    """What a module imports, as absolute names; relative ones are resolved."""
    package = [part for part in path.parent.parts if part != "lmcache_sglang"]
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                above = ["lmcache_sglang", *package][: 2 + len(package) - level] if level else []
                base = [*above, *([module] if module else [])]
                yield from (".".join([*base, alias.name]) for alias in names)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("name", FOLDERS)
def test_link_reaches_top_level_folder(name: str) -> None:
    assert (ROOT / "lmcache_sglang" / name).is_symlink()
    assert (ROOT / "lmcache_sglang" / name).resolve() == ROOT / name


def test_kernels_folder_never_shadows_hugging_face_kernels() -> None:
    """SGLang imports `kernels`, also when it is started from this folder."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    found = importlib.util.find_spec("kernels")
    if found is None or found.origin is None:  # nothing, or only our own namespace portion
        pytest.skip("Hugging Face kernels is not installed")
    origin = subprocess.check_output(
        [sys.executable, "-c", "import kernels; print(kernels.__file__)"], cwd=ROOT, text=True
    )
    assert "site-packages" in origin


def test_an_installation_has_one_name() -> None:
    """Beside metadata, the command in a bin folder, and the hook of an editable installation."""
    installed = {path.parts[0] for path in files("lmcache-sglang") or [] if len(path.parts) > 1}
    names = {name for name in installed if not name.endswith((".dist-info", "__pycache__", ".."))}
    assert names == {"lmcache_sglang"}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["tool"]["scikit-build"]["wheel"]["packages"] == ["lmcache_sglang"]


def test_a_wheel_has_the_source_that_is_compiled_at_first_use_and_no_other() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    excluded = GitIgnoreSpec.from_lines(settings["tool"]["scikit-build"]["wheel"]["exclude"])
    source = [*ROOT.glob("kernels/csrc/*"), *ROOT.glob("storage/csrc/*")]
    assert len(source) > 30
    shipped = {
        path.name
        for path in source
        if not excluded.match_file(Path("lmcache_sglang") / path.relative_to(ROOT))
    }
    assert shipped == {sources.KERNELS, *sources.HEADERS}


@pytest.mark.parametrize(
    "name", ["lmcache_sglang", "lmcache_sglang.config", "lmcache_sglang.storage.chain"]
)
def test_importing_us_imports_no_engine(name: str) -> None:
    """It would cost seconds, and decide for the user which engine starts."""
    code = f"import sys, {name}; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert name in loaded
    assert not ENGINES & set(loaded)


@pytest.mark.parametrize("path", modules(), ids=str)
def test_no_module_imports_a_folder_by_its_top_level_name(path: Path) -> None:
    assert not [name for name in imports(path) for folder in FOLDERS if is_within(name, folder)]


@pytest.mark.parametrize("path", product(), ids=str)
def test_no_module_of_the_product_leans_on_what_it_must_not(path: Path) -> None:
    """Pickled data can run code; tests are not part of the product."""
    forbidden = ["pickle", "marshal", "shelve", "dill", "cloudpickle", "lmcache_sglang.testing"]
    assert not [name for name in imports(path) for other in forbidden if is_within(name, other)]


@pytest.mark.parametrize("path", product(), ids=str)
def test_only_config_reads_the_environment(path: Path) -> None:
    if path.name == "config.py":
        pytest.skip("the one reader")
    readers = {"environ", "environb", "getenv", "getenvb"}
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        match node:
            case ast.Attribute(value=ast.Name(id="os"), attr=name):
                assert name not in readers, f"line {node.lineno}"
            case ast.ImportFrom(module="os", names=names):
                assert not readers & {alias.name for alias in names}, f"line {node.lineno}"


def test_imports_resolve_relative_names() -> None:
    """Or the tests above would look at the wrong names."""
    assert "lmcache_sglang.kernels.pages.PageSegments" in imports(Path("storage/chain.py"))
    assert "lmcache_sglang.errors.TierError" in imports(Path("storage/chain.py"))
    assert "lmcache_sglang.storage.base.UpperTier" in imports(Path("storage/slab/tier.py"))
    assert "lmcache_sglang.errors.Reason" in imports(Path("storage/slab/tier.py"))
    assert "lmcache_sglang.errors.TierError" in imports(
        Path("lmcache_sglang/testing/tier_suite.py")
    )
