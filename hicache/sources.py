"""Where the weights that this process runs come from, as SGLang's settings have it.

Mostly files, of which a fingerprint can be taken. What comes from elsewhere nobody could tell from other weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from . import identity

# Ways of loading that give the weights of the model's files as they are.
PLAIN_FORMATS = ("auto", "safetensors", "pt", "gguf", "mistral", "npcache", "fastsafetensors")
# Those that make something else of the same files, the same each time: of `dummy`, random numbers from one seed. Of
# all others, and of those that SGLang may get, the weights are not the files': another process's, or from a copy made
# earlier (`presharded`).
_FILE_FORMATS = (
    *PLAIN_FORMATS,
    "dummy",
    "instanttensor",
    "sharded_state",
    "bitsandbytes",
    "layered",
    "flash_rl",
    "runai_streamer",
)
# Keys of `model_loader_extra_config` that name files beside the model's.
_LOADER_PATHS = ("pattern", "qlora_adapter_name_or_path")


class Source(NamedTuple):
    """A place that weights come from."""

    path: str
    revision: str | None = None
    download_dir: str | None = None  # where SGLang puts downloads, if not in the hub's cache
    is_model: bool = True  # or an adapter; else whatever lies there

    @property
    def place(self) -> str:
        """The path, and the revision where it is one of several."""
        return self.path if self.revision is None else f"{self.path} ({self.revision})"

    def fingerprint(self) -> str:
        """Of what lies there now. Raises: OSError when it cannot be read on this machine."""
        if self.is_model:
            return identity.fingerprint(self._here())
        return identity.fingerprint_of_all(Path(self.path))

    def sight(self) -> identity.Sight | None:
        """How it lies there now, without a look into it; None when it is not there to be seen."""
        try:
            if self.is_model:
                return identity.sight(identity.model_files(self._here()))
            return identity.sight(identity.all_files(Path(self.path)))
        except OSError:
            return None

    def _here(self) -> Path:
        """Raises: OSError."""
        path = Path(self.path)
        if path.exists():
            return path
        found = _downloaded(self.path, self.revision)
        if self.download_dir is not None:
            # SGLang puts the weights there, and looks for the rest here.
            weights = _downloaded(self.path, self.revision, self.download_dir)
            if weights.resolve() != found.resolve():
                raise OSError(f"its weights lie in {weights} and its configuration in {found}")
        return found


def _downloaded(name: str, revision: str | None, folder: str | None = None) -> Path:
    """Raises: OSError when it is not on this machine."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(name, revision=revision, cache_dir=folder, local_files_only=True)
        )
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise OSError(str(error)) from error


class Adapter(NamedTuple):
    """A LoRA adapter of the command line."""

    id: str  # as SGLang hashes pages with
    name: str
    source: Source


def of_model() -> Source:
    """The files of the model that this process serves."""
    from sglang.srt.runtime_context import get_model

    model = get_model()
    return Source(str(model.model_path), model.revision, model.download_dir)


def of_draft() -> Source | None:
    """The files of the draft model of speculative decoding; None where it has none of its own."""
    from sglang.srt.runtime_context import get_model, get_spec

    spec = get_spec()
    if spec.speculative_algorithm is None or not spec.speculative_draft_model_path:
        return None
    path, revision = spec.speculative_draft_model_path, spec.speculative_draft_model_revision
    return Source(str(path), revision, get_model().download_dir)


def beside_the_model() -> dict[str, Source]:
    """What else the settings take scales, weights or configuration of the model from, by the setting's name."""
    from sglang.srt.runtime_context import get_exec, get_model, get_spec

    settings = {
        "quantization_param_path": get_model(),
        "rl_quant_profile": get_model(),
        "modelopt_checkpoint_restore_path": get_model(),
        "decrypted_config_file": get_model(),
        "kt_weight_path": get_exec().moe,
    }
    if get_spec().speculative_algorithm is not None:
        settings["uno_lora_path"] = get_spec()
    return _named(settings)


def beside_the_draft() -> dict[str, Source]:
    """The same of the draft model."""
    from sglang.srt.runtime_context import get_model

    return _named({"decrypted_draft_config_file": get_model()})


def _named(settings: dict[str, Any]) -> dict[str, Source]:
    paths = {name: getattr(group, name) for name, group in settings.items()}
    return {name: Source(str(path), is_model=False) for name, path in paths.items() if path}


def adapters() -> list[Adapter]:
    """Those that SGLang loads at its start; others get a random id from it."""
    from sglang.srt.runtime_context import get_lora, get_model

    if not get_lora().enable_lora:
        return []
    folder = get_model().download_dir
    return [
        Adapter(ref.lora_id, ref.lora_name, Source(str(ref.lora_path), None, folder))
        for ref in get_lora().lora_paths or ()
    ]


def seen() -> dict[str, identity.Sight | None]:
    """How all of them lie there now, by place. It costs a `stat` a file."""
    draft = of_draft()
    sources = [
        of_model(),
        *([draft] if draft else []),
        *beside_the_model().values(),
        *beside_the_draft().values(),
        *(adapter.source for adapter in adapters()),
    ]
    return {source.place: source.sight() for source in sources}


def format_of(load_format: Any) -> str:
    """The name of a way of loading, which SGLang has as a name or as one of its enumeration."""
    return str(getattr(load_format, "value", load_format))


def not_of_files() -> Iterator[str]:
    """Why the weights of the model are not those of the files that the settings name."""
    from sglang.srt.runtime_context import get_model

    model = get_model()
    load_format = format_of(model.load_format)
    if load_format not in _FILE_FORMATS:
        yield f"--load-format {load_format} takes weights that are not those of the model's files"
    if model.weight_cache_mode != "off":
        yield f"--weight-cache-mode {model.weight_cache_mode} takes the weights that a daemon holds"
    named = sorted(set(_loader_keys(model.model_loader_extra_config)) & set(_LOADER_PATHS))
    if named:
        yield f"--model-loader-extra-config names other files ({', '.join(named)})"
    is_calibrated = model.modelopt_quant or model.quantize_and_serve
    if is_calibrated and not model.modelopt_checkpoint_restore_path:
        yield "ModelOpt quantizes the weights anew at each start"


def draft_not_of_files() -> bool:
    """The same of the draft model, where it is loaded in another way than the model."""
    from sglang.srt.runtime_context import get_spec

    load_format = get_spec().speculative_draft_load_format
    return load_format is not None and format_of(load_format) not in _FILE_FORMATS


def _loader_keys(extra: Any) -> dict[str, Any]:
    """Of a setting that SGLang has parsed before this, or will not start with."""
    parsed = json.loads(extra) if isinstance(extra, str) and extra else extra
    return parsed if isinstance(parsed, dict) else {}


def with_weights(adapter: str, fingerprint: str) -> str:
    """An adapter's id that says which weights it has. Args: adapter: an id of its name and path only."""
    return hashlib.sha256(f"{adapter}\0{fingerprint}".encode()).hexdigest()[:32]
