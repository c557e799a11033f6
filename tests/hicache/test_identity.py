"""What makes two pages the same: nothing that matters may be left out, nothing else may get in."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lmcache_sglang.hicache import identity
from lmcache_sglang.hicache.identity import (
    ModelIdentity,
    PageIdentity,
    all_files,
    fingerprint,
    fingerprint_of_all,
    model_files,
    namespace,
    sight,
)
from lmcache_sglang.storage.base import NAMESPACE_BYTES

MODEL = ModelIdentity(
    name="meta-llama/Llama-3.1-8B",
    fingerprint="5f" * 32,
    kv_dtype="auto",
    settings={"dtype": "bfloat16", "quantization": "None"},
)
PAGE = PageIdentity(
    pool="kv",
    page_size=64,
    page_bytes=8 << 20,
    dtype="bfloat16",
    layers=(0, 32),
    stored_layers=32,
    heads=(0, 4),
    total_heads=8,
    head_dims=(128, 128),
    layout="page_first",
    slices={"cp_rank": 0, "cp_size": 2},
)

# Changing this makes every store in the world cold: each page lies under its digest. If the change is
# meant, raise identity.VERSION with it.
GOLDEN = "8c3981ca79dc5d1929cfa799fa3020ca"


def others(value: object) -> list[object]:
    """Values of the same kind, each different in one place."""
    match value:
        case str():
            return [value + "x", ""]
        case int():
            return [value + 1]
        case tuple():
            return [
                (*value[:i], other, *value[i + 1 :])
                for i, item in enumerate(value)
                for other in others(item)
            ]
        case dict() if not value:
            return [{"new": "x"}]
        case dict():
            first, *_ = value
            changed = [value | {first: other} for other in others(value[first])]
            return [value | {"new": value[first]}, {}, *changed]
    raise AssertionError(f"teach this test to change a {type(value).__name__}")


def variants(whole: msgspec.Struct) -> list[Any]:
    """One parameter for each single change of each field, also of fields that are new."""
    return [
        pytest.param(msgspec.structs.replace(whole, **{name: other}), id=f"{name}-{i}")
        for name in whole.__struct_fields__
        for i, other in enumerate(others(getattr(whole, name)))
    ]


# --- the namespace ---


@pytest.mark.parametrize("model", variants(MODEL))
def test_pages_of_another_model_never_hit(model: ModelIdentity) -> None:
    assert namespace(model, PAGE) != namespace(MODEL, PAGE)


@pytest.mark.parametrize("page", variants(PAGE))
def test_pages_of_another_shape_never_hit(page: PageIdentity) -> None:
    assert namespace(MODEL, page) != namespace(MODEL, PAGE)


def test_every_field_is_in_the_variants() -> None:
    """Else a change of one of them could go unseen, and this file would not know."""
    for whole in (MODEL, PAGE):
        covered = {param.id.rpartition("-")[0] for param in variants(whole)}
        assert covered == set(whole.__struct_fields__)


def test_a_new_meaning_is_a_new_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    before = namespace(MODEL, PAGE)
    monkeypatch.setattr(identity, "VERSION", identity.VERSION + 1)
    assert namespace(MODEL, PAGE) != before


def test_the_namespace_is_the_one_that_stores_in_use_were_written_with() -> None:
    assert namespace(MODEL, PAGE).hex() == GOLDEN
    assert len(namespace(MODEL, PAGE)) == NAMESPACE_BYTES


def test_the_order_in_which_settings_were_read_does_not_matter() -> None:
    backwards = dict(reversed(MODEL.settings.items()))
    assert list(backwards) != list(MODEL.settings)
    assert namespace(msgspec.structs.replace(MODEL, settings=backwards), PAGE).hex() == GOLDEN


@pytest.mark.parametrize("seed", ["0", "1", "4242"])
def test_another_process_finds_the_same_pages(seed: str) -> None:
    code = """
import sys, msgspec
from lmcache_sglang.hicache.identity import ModelIdentity, PageIdentity, namespace
model, page = msgspec.json.decode(sys.argv[1], type=tuple[ModelIdentity, PageIdentity])
print(namespace(model, page).hex())
"""
    run = subprocess.run(
        [sys.executable, "-c", code, msgspec.json.encode((MODEL, PAGE)).decode()],
        env=os.environ | {"PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.stdout.strip() == GOLDEN, run.stderr


# --- the fingerprint ---


def write_safetensors(path: Path, tensors: Mapping[str, bytes], pad: int = 0) -> dict[str, int]:
    """Write a weight file; where each tensor's bytes start in it."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, data in tensors.items():
        table[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [end, end + len(data)]}
        end += len(data)
    header = json.dumps(table).encode() + b" " * pad
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"".join(tensors.values()))
    start = 8 + len(header)
    return {name: start + table[name]["data_offsets"][0] for name in tensors}  # type: ignore[index]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def noise(seed: int, size: int) -> bytes:
    return bytes((seed * 31 + i * 7) % 251 for i in range(size))


TENSORS = {"embed": noise(1, 5000), "layers.0.q": noise(2, 3000), "head": noise(3, 40)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model directory of two weight files, a configuration, and things that do not count."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_safetensors(folder / "model-1-of-2.safetensors", TENSORS)
    write_safetensors(folder / "model-2-of-2.safetensors", {"norm": noise(4, 900)})
    (folder / "config.json").write_text('{"num_hidden_layers": 1}')
    (folder / "README.md").write_text("A model.")
    return folder


def test_a_copy_elsewhere_is_the_same_model(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "other" / "place", copy_function=shutil.copyfile)
    os.utime(copy / "config.json", (0, 0))
    assert fingerprint(copy) == fingerprint(model)


def test_a_link_to_the_weights_is_the_same_model(model: Path, tmp_path: Path) -> None:
    """Hugging Face's cache keeps files as links to blobs."""
    (tmp_path / "snapshot").mkdir()
    for file in model.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert fingerprint(tmp_path / "snapshot") == fingerprint(model)


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_other_weights_in_one_tensor_are_another_model(model: Path, name: str, place: str) -> None:
    file = model / "model-1-of-2.safetensors"
    start = write_safetensors(file, TENSORS)[name]
    before = fingerprint(model)
    length = len(TENSORS[name])
    flip(file, start + {"first": 0, "middle": length // 2, "last": length - 1}[place])
    assert fingerprint(model) != before


@pytest.mark.parametrize("name", identity._CONFIG_FILES)
def test_another_configuration_is_another_model(model: Path, name: str) -> None:
    seen = {fingerprint(model)}
    for text in ('{"rope_theta": 1}', '{"rope_theta": 2}'):
        (model / name).write_text(text)
        seen.add(fingerprint(model))
    assert len(seen) == 3


def test_the_same_text_in_another_configuration_file_is_another_model(model: Path) -> None:
    (model / "hf_quant_config.json").write_text("{}")
    before = fingerprint(model)
    (model / "hf_quant_config.json").rename(model / "quantize_config.json")
    assert fingerprint(model) != before


def test_renaming_a_weight_file_keeps_the_model(model: Path) -> None:
    before = fingerprint(model)
    (model / "model-1-of-2.safetensors").rename(model / "weights.safetensors")
    assert fingerprint(model) == before


def test_a_file_that_is_no_weights_does_not_count(model: Path) -> None:
    before = fingerprint(model)
    (model / "README.md").write_text("A better model.")
    (model / "tokenizer.json").write_text("{}")
    assert fingerprint(model) == before


def test_a_tensor_with_another_name_is_another_model(model: Path) -> None:
    before = fingerprint(model)
    write_safetensors(model / "model-2-of-2.safetensors", {"mron": noise(4, 900)})
    assert fingerprint(model) != before


def test_a_missing_or_extra_weight_file_is_another_model(model: Path) -> None:
    whole = fingerprint(model)
    (model / "model-2-of-2.safetensors").rename(model / "elsewhere")
    less = fingerprint(model)
    write_safetensors(model / "model-3-of-2.safetensors", {"extra": noise(9, 10)})
    assert len({whole, less, fingerprint(model)}) == 3


def test_the_same_file_twice_is_another_model(model: Path) -> None:
    before = fingerprint(model)
    shutil.copyfile(model / "model-2-of-2.safetensors", model / "model-3-of-2.safetensors")
    assert fingerprint(model) != before


def test_the_order_in_which_a_directory_lists_its_files_does_not_matter(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint(model)
    as_listed = identity._weight_files
    monkeypatch.setattr(identity, "_weight_files", lambda path: as_listed(path)[::-1])
    assert len(as_listed(model)) == 2
    assert fingerprint(model) == before


def table_of(**entries: object) -> bytes:
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header


DAMAGED = {
    "empty": b"",
    "short": b"\1\0\0",
    "length only": struct.pack("<Q", 100),
    "length of nothing": struct.pack("<Q", 0) + b"data",
    "length beyond reason": struct.pack("<Q", 1 << 60) + b"data",
    "header only": table_of(),
    "header without tensors": table_of(__metadata__={"format": "pt"}),
    "header cut off": table_of(a={"data_offsets": [0, 4]})[:-3],
    "not JSON": struct.pack("<Q", 4) + b"\xff\xfe{]",
    "bad UTF-8 in a name": struct.pack("<Q", 8) + b'{"\xff":{}}',
    "a list": struct.pack("<Q", 4) + b"[1] ",
    "no offsets": table_of(a={"dtype": "U8"}),
    "a number for a tensor": table_of(a=7),
    "offsets of another kind": table_of(a={"data_offsets": ["0", None]}),
    "one offset": table_of(a={"data_offsets": [4]}),
    "offsets before the file": table_of(a={"data_offsets": [-400, 4]}),
    "offsets beyond the file": table_of(a={"data_offsets": [0, 1 << 70]}),
    "offsets backwards": table_of(a={"data_offsets": [4, 0]}) + b"data",
    "tensor cut off": table_of(a={"data_offsets": [0, 4000]}) + b"data",
    "nested deeply": struct.pack("<Q", 200_000) + b"[" * 200_000,
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_weight_file_is_told_apart_and_never_a_crash(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(DAMAGED[kind])
    before = fingerprint(tmp_path)
    file.write_bytes(DAMAGED[kind] + b"more")
    assert fingerprint(tmp_path) != before


@pytest.mark.parametrize("size", [40, 5000, 1 << 20])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model-Q4.gguf", "model.pt", "model.pth"])
def test_other_formats_are_sampled_evenly(name: str, size: int, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(noise(5, size))
    before = fingerprint(tmp_path)
    for place in (0, size // 2 // 64 * 64, size - 1):
        flip(file, place)
        assert fingerprint(tmp_path) != before, place
        flip(file, place)
    assert fingerprint(tmp_path) == before
    file.write_bytes(noise(5, size) + b"\0")
    assert fingerprint(tmp_path) != before


def test_a_longer_file_is_another_model_though_all_samples_are_alike(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(bytes(1 << 20))
    before = fingerprint(tmp_path)
    file.write_bytes(bytes((1 << 20) + 64))
    assert fingerprint(tmp_path) != before


def test_a_single_file_is_a_model(model: Path) -> None:
    file = model / "model-1-of-2.safetensors"
    alone = fingerprint(file)
    assert alone != fingerprint(model)
    (model / "config.json").write_text("{}")  # it lies beside the file and is not its own
    assert fingerprint(file) == alone
    flip(file, file.stat().st_size - 1)
    assert fingerprint(file) != alone


def test_no_weights_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="no weight files"):
        fingerprint(tmp_path)


def test_a_directory_that_is_not_there_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fingerprint(tmp_path / "absent")


class Counting(io.FileIO):
    """A file that counts what is read from it."""

    total = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(-1 if size is None else size) or b""
        Counting.total += len(data)
        return data


@pytest.mark.parametrize("suffix", ["safetensors", "gguf"])
def test_large_weights_are_not_read_whole(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, each = 20, 200_000
    file = tmp_path / f"model.{suffix}"
    write_safetensors(file, {f"tensor.{i}": noise(i, each) for i in range(count)})
    monkeypatch.setattr(Counting, "total", 0)
    monkeypatch.setattr(Path, "open", lambda path, mode, **_: Counting(path, mode))
    fingerprint(tmp_path)
    table = 2 * (200 * count)  # read once to parse and once for the digest
    samples = 3 * count if suffix == "safetensors" else 2 * identity._SAMPLES
    assert identity._SAMPLE * count < Counting.total < table + samples * identity._SAMPLE + 4096


def test_a_file_that_has_not_changed_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.bin").write_bytes(b"weights")
    read: list[Path] = []
    digest = identity._file_digest

    def noted(file: Path) -> bytes:
        read.append(file)
        return digest(file)

    monkeypatch.setattr(identity, "_digests", {})
    monkeypatch.setattr(identity, "_file_digest", noted)
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == before
    assert len(read) == 1
    (tmp_path / "model.bin").write_bytes(b"WEIGHTS")
    assert fingerprint(tmp_path) != before
    assert len(read) == 2


@pytest.mark.parametrize("at", [0, 5000, -1])
def test_every_byte_of_a_small_file_counts_whatever_it_is(at: int, tmp_path: Path) -> None:
    """Scales in JSON: samples would leave most of them out."""
    file = tmp_path / "scales.json"
    file.write_bytes(noise(1, 10_000))
    before = fingerprint_of_all(file)
    flip(file, at % 10_000)
    assert fingerprint_of_all(file) != before


def test_a_folder_of_any_files_is_known_by_all_of_them_and_their_names(tmp_path: Path) -> None:
    folder, copy = tmp_path / "experts", tmp_path / "copy"
    (folder / "layer_0").mkdir(parents=True)
    (folder / "layer_0" / "down.kt").write_bytes(b"down")
    (folder / "large").write_bytes(noise(2, identity._WHOLE_MOST + 1))
    shutil.copytree(folder, copy)
    seen = {fingerprint_of_all(folder), fingerprint_of_all(copy)}
    assert len(seen) == 1
    flip(copy / "large", 0)
    seen.add(fingerprint_of_all(copy))
    (folder / "layer_0").rename(folder / "layer_1")
    seen.add(fingerprint_of_all(folder))
    (folder / "more").touch()
    seen.add(fingerprint_of_all(folder))
    assert len(seen) == 4


def test_what_is_not_there_has_no_fingerprint_and_no_sight(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(OSError, match="missing"):
        fingerprint_of_all(missing)
    with pytest.raises(OSError, match="missing"):
        sight(all_files(missing))
    with pytest.raises(FileNotFoundError, match="no file"):
        fingerprint_of_all(tmp_path)


def test_the_sight_of_a_model_changes_with_what_its_fingerprint_is_of(model: Path) -> None:
    before = sight(model_files(model))
    (model / "README.md").write_text("read me")
    assert sight(model_files(model)) == before
    for file in model_files(model):
        (model / "new").write_bytes(file.read_bytes())
        (model / "new").replace(file)  # the same content, but nobody looked into it before
        after = sight(model_files(model))
        assert after != before
        before = after
