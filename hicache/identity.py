"""What makes two pages interchangeable: the namespace, and the fingerprint of a model's weights.

A page's key is the namespace's digest followed by SGLang's own page hash: SHA-256 over the token ids
from the start of the request, seeded with the LoRA id and the cache salt. The namespace holds everything
else that must match for the bytes to mean the same. It never holds who wrote them.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from ..storage.base import NAMESPACE_BYTES

VERSION = 2  # of the meaning of these fields; a change of meaning is a new version

UNREAD = "unread:"  # begins the fingerprint of weights that could not be looked at

_SAMPLE = 256  # bytes looked at in each place of a weight file
_SAMPLES = 64  # places in a file that has no tensor table
_WHOLE_MOST = 1 << 20  # a file of unknown kind is read in whole up to here
_HEADER_MOST = 256 << 20  # a longer safetensors header is none
_CONFIG_FILES = (
    "config.json",
    "hf_quant_config.json",
    "quantize_config.json",
    "adapter_config.json",
    "params.json",
)
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth")


class _Tensor(msgspec.Struct):
    """What is used of an entry of a safetensors table; the `__metadata__` entry has no offsets."""

    data_offsets: tuple[int, int] = (0, 0)  # from the end of the table


# How files lie somewhere, without a look into them: inode, size, time of modification and of change. A change of
# content changes the last one, which nobody can set back. Not the device: a network mount gets another when it is
# mounted again.
Sight = tuple[tuple[int, int, int, int], ...]

_digests: dict[tuple[str, Sight], bytes] = {}

_TABLE = msgspec.json.Decoder(dict[str, _Tensor])


class ModelIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """Which model computed a page, with what."""

    name: str  # as served
    fingerprint: str  # of its weights and configuration, see `fingerprint`
    kv_dtype: str  # logical: fp8 kinds differ although their bytes look alike
    settings: dict[str, str]  # of the engine, that change what is computed

    @property
    def lasting(self) -> bool:
        """Whether another engine can ever have the same identity."""
        return "weights" not in self.settings and not self.fingerprint.startswith(UNREAD)


class PageIdentity(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Which part of a token's KV a page holds, and in what order its bytes lie."""

    pool: str
    page_size: int  # tokens
    page_bytes: int
    dtype: str  # of the stored elements
    layers: tuple[int, int]  # first, and one past the last
    stored_layers: int  # with packed draft layers
    heads: tuple[
        int, int
    ]  # KV heads of the model, first and one past the last; (0, 0): all on each rank
    total_heads: int  # 0: all on each rank
    head_dims: tuple[int, int]  # of K and V
    layout: str  # order of the bytes
    slices: dict[
        str, int
    ]  # coordinates of the rank, where a page is cut by more than heads and layers
    shape: dict[str, str] = {}  # of state that is no plain K and V


def namespace(model: ModelIdentity, page: PageIdentity) -> bytes:
    """The digest that starts the key of every page of this kind. The same in every process."""
    return digest(text_of(model, page))


def text_of(model: ModelIdentity, page: PageIdentity) -> bytes:
    """What a namespace is the digest of: JSON, the same in every process."""
    return msgspec.json.encode({"version": VERSION, "model": model, "page": page}, order="sorted")


def digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()[:NAMESPACE_BYTES]


def fingerprint(model: Path) -> str:
    """A digest of a model's configuration and weights, from a small part of their bytes.

    For each weight file: its size, and for safetensors the tensor table and `_SAMPLE` bytes from the
    start, the middle and the end of each tensor; for any other format `_SAMPLES` places spread evenly.
    File names and times do not enter, so a copy of a model elsewhere is the same model. A file that was looked at
    is not read again by this process until it changes.

    Args:
        model: the directory of a model, or a single weight file.

    Raises:
        OSError: it cannot be read.
        FileNotFoundError: it holds no weight file.
    """
    digest = hashlib.sha256()
    for file in _config_files(model):
        _add(digest, file.name.encode())
        _add(digest, file.read_bytes())
    weights = _weight_files(model)
    if not weights:
        raise FileNotFoundError(f"no weight files in {model}")
    for part in sorted(_digest_as_it_is(file) for file in weights):
        _add(digest, part)
    return digest.hexdigest()


def fingerprint_of_all(path: Path) -> str:
    """A digest of whatever lies at a path: a file, or a folder with all that is in it, by their names within it.

    For what decides weights and is no model: scales, say, or experts in a format of their own. Files of up to
    `_WHOLE_MOST` bytes enter whole, others as in `fingerprint`.

    Raises:
        OSError: it cannot be read, or there is no file.
    """
    digest = hashlib.sha256()
    files = all_files(path)
    if not files:
        raise FileNotFoundError(f"no file in {path}")
    for file in files:
        _add(digest, os.fsencode(file.relative_to(path)))
        small = file.stat().st_size <= _WHOLE_MOST
        _add(digest, file.read_bytes() if small else _digest_as_it_is(file))
    return digest.hexdigest()


def model_files(model: Path) -> list[Path]:
    """Those that `fingerprint` looks at."""
    return [*_config_files(model), *_weight_files(model)]


def all_files(path: Path) -> list[Path]:
    """Those that `fingerprint_of_all` looks at, in its order."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file())


def sight(files: Iterable[Path]) -> Sight:
    """How files lie there now. Two that are equal are of the same files with the same content. Raises: OSError."""
    states = [file.stat() for file in files]
    return tuple(
        sorted(
            (state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns) for state in states
        )
    )


def _config_files(model: Path) -> list[Path]:
    if model.is_file():
        return []
    return [file for name in _CONFIG_FILES if (file := model / name).is_file()]


def _weight_files(model: Path) -> list[Path]:
    if model.is_file():
        return [model]
    return [file for pattern in _WEIGHT_FILES for file in model.glob(pattern)]


def _digest_as_it_is(file: Path) -> bytes:
    """`_file_digest`, once in this process for a file that has not changed."""
    known = os.fspath(file), sight([file])
    if known not in _digests:
        _digests[known] = _file_digest(file)
    return _digests[known]


def _file_digest(file: Path) -> bytes:
    size = file.stat().st_size
    digest = hashlib.sha256(struct.pack("<Q", size))
    with file.open("rb", buffering=0) as weights:  # a buffer would read 8 KiB for each sample
        for place in _places(weights.read(8), file, size):
            weights.seek(place)
            _add(digest, weights.read(_SAMPLE))
    return digest.digest()


def _places(head: bytes, file: Path, size: int) -> Iterator[int]:
    """Offsets to sample, in the order of the file."""
    tensors = _tensors(head, file, size) if file.suffix == ".safetensors" else []
    if not tensors:
        yield from range(0, size, max(1, size // _SAMPLES))
        yield max(0, size - _SAMPLE)
        return
    yield from range(0, tensors[0][0], _SAMPLE)  # the whole table
    for start, end in tensors:
        yield from sorted({start, (start + end) // 2, max(start, end - _SAMPLE)})


def _tensors(head: bytes, file: Path, size: int) -> list[tuple[int, int]]:
    """Where each tensor lies in a safetensors file; none when the file is not a whole one.

    Format: an 8-byte little-endian length, that many bytes of JSON with `data_offsets` relative to the
    end of it, the data (https://github.com/huggingface/safetensors, "Format").
    """
    length = int.from_bytes(head, "little")
    if not 0 < length <= _HEADER_MOST:
        return []
    with file.open("rb") as weights:
        weights.seek(8)
        try:
            table = _TABLE.decode(weights.read(length))
        except ValueError:  # what msgspec raises derives from it; bad UTF-8 is a plain one
            return []
    data = 8 + length
    spans = [entry.data_offsets for name, entry in table.items() if name != "__metadata__"]
    if not all(0 <= start <= end <= size - data for start, end in spans):
        return []
    return sorted((data + start, data + end) for start, end in spans)


def _add(digest: hashlib._Hash, data: bytes) -> None:
    digest.update(struct.pack("<Q", len(data)))
    digest.update(data)
