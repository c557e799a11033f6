"""vLLM's configuration gives the identity that SGLang's side gives the same weights, and no other weights get it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmcache_sglang.hicache.identity import UNREAD
from lmcache_sglang.hicache.sources import Source
from lmcache_sglang.vllm_connector.identity import model_identity

LONG_AGO = 1_000_000_000
PHI3 = SimpleNamespace(
    rope_parameters={"rope_type": "longrope"}, original_max_position_embeddings=4096
)
NGRAM = SimpleNamespace(
    method="ngram", draft_model_config=SimpleNamespace(model="none", revision=None)
)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files that were there before this process began."""
    import psutil

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.bin").write_bytes(bytes(2048))
    later = SimpleNamespace(create_time=lambda: 4e9)
    monkeypatch.setattr(psutil, "Process", lambda: later)
    return tmp_path


def config(model: Path | str, **changed: Any) -> Any:
    own = {
        "model": str(model),
        "served_model_name": "as-served",
        "dtype": torch.bfloat16,
        "quantization": None,
        "hf_overrides": {},
        "hf_config": SimpleNamespace(),
        "hf_text_config": SimpleNamespace(),
        "hf_config_path": None,
        "config_format": "auto",
        "quantization_config": None,
        "override_generation_config": {},
        "max_model_len": 4096,
        "original_max_model_len": None,
        "revision": None,
    }
    cache = {"cache_dtype": "auto", "calculate_kv_scales": False}
    load = {"load_format": "auto", "download_dir": None}
    parts = [part | {k: v for k, v in changed.items() if k in part} for part in (own, cache, load)]
    model_config, cache_config, load_config = (SimpleNamespace(**part) for part in parts)
    return SimpleNamespace(
        model_config=model_config,
        cache_config=cache_config,
        load_config=load_config,
        speculative_config=changed.get("speculative_config"),
    )


def test_the_ordinary_one_is_sglangs(model: Path) -> None:
    """As tests/hicache/test_engine.py has it."""
    identity = model_identity(config(model))
    assert identity.name == "as-served"
    assert identity.settings == {"dtype": "bfloat16"}
    assert identity.kv_dtype == "bfloat16"
    assert identity.fingerprint == Source(str(model)).fingerprint()
    assert identity.lasting


@pytest.mark.parametrize(
    "changed",
    [
        {"dtype": torch.float16},
        {"cache_dtype": "fp8_e4m3"},
        {"quantization": "fp8"},
        {"hf_overrides": {"rope_theta": 1}},
        {"hf_overrides": len},
        {"hf_config_path": "/elsewhere"},
        {"config_format": "other"},
        {"hf_text_config": PHI3},
        {"hf_text_config": SimpleNamespace(model_type="llama4_text")},
        {"load_format": "bitsandbytes"},
        {"load_format": "dummy"},
        {"calculate_kv_scales": True},
        {"served_model_name": ["another", "as-served"]},
        {
            "speculative_config": SimpleNamespace(
                method="eagle", draft_model_config=SimpleNamespace(model="none", revision=None)
            )
        },
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_changes_the_answers_is_another_one(changed: dict[str, Any], model: Path) -> None:
    assert model_identity(config(model, **changed)) != model_identity(config(model))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"max_model_len": 4096}, {"max_model_len": 4097}),
        (
            {"quantization": "fp8"},
            {"quantization": "fp8", "quantization_config": {"ignore": ["a"]}},
        ),
    ],
    ids=["long factors", "quantization"],
)
def test_what_depends_on_two_settings_is_another_one(
    one: dict[str, Any], other: dict[str, Any], model: Path
) -> None:
    found = [model_identity(config(model, hf_text_config=PHI3, **each)) for each in (one, other)]
    assert found[0] != found[1]
    assert all(each.lasting for each in found)


def test_factors_go_by_the_length_they_are_for_alone(model: Path) -> None:
    lengths = [
        model_identity(config(model, hf_text_config=PHI3, max_model_len=length))
        for length in (2048, 4096, 8192, 131072)
    ]
    assert lengths[0] == lengths[1]
    assert lengths[2] == lengths[3] != lengths[0]
    fitted = model_identity(config(model, hf_text_config=PHI3, original_max_model_len=-1))
    assert fitted not in lengths


@pytest.mark.parametrize(
    "changed",
    [
        {"load_format": "safetensors"},
        {"cache_dtype": "auto"},
        {"max_model_len": 8192},
        {"hf_text_config": SimpleNamespace(rope_parameters={"rope_type": "yarn", "factor": 4.0})},
        {"speculative_config": NGRAM},
    ],
    ids=["format", "dtype", "length", "yarn", "ngram"],
)
def test_what_does_not_is_the_same(changed: dict[str, Any], model: Path) -> None:
    assert model_identity(config(model, **changed)) == model_identity(config(model))


def test_what_files_say_of_their_quantization_need_not_be_said_again(model: Path) -> None:
    found = config(model, quantization="awq")
    found.model_config.hf_config.quantization_config = {"quant_method": "awq"}
    assert "quantization" not in model_identity(found).settings


@pytest.mark.parametrize(
    "doubt",
    [
        lambda model: config(model, load_format="dummy"),
        lambda model: config(model, calculate_kv_scales=True),
        lambda model: config("nobody/no-such-model"),
        lambda model: config(model, hf_overrides=len),
        lambda model: config(model, hf_config_path="/elsewhere"),
    ],
    ids=["dummy", "scales", "unread", "function", "configuration"],
)
def test_weights_that_nobody_can_name_last_no_longer_than_their_engine(
    doubt: Callable[[Path], Any], model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = model_identity(doubt(model)), model_identity(doubt(model))
    assert not one.lasting
    assert one != other
    assert "cold after a restart" in caplog.text


def test_files_that_changed_since_the_engine_began_are_not_what_it_loaded(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(create_time=lambda: LONG_AGO))
    os.utime(model / "model.bin", (LONG_AGO - 1, LONG_AGO - 1))  # which anybody can set
    identity = model_identity(config(model))
    assert not identity.lasting
    assert not identity.fingerprint.startswith(UNREAD)
