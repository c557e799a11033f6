"""What the running SGLang is asked about its model, through SGLang's own published settings."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmcache_sglang.hicache import sources, weights
from lmcache_sglang.hicache.engine import adapter_id, draft_identity, model_identity
from lmcache_sglang.hicache.identity import ModelIdentity

Serving = Callable[..., AbstractContextManager[Any]]


@pytest.fixture(autouse=True)
def own_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_state", weights._State())


@pytest.fixture
def serving(sglang: None, monkeypatch: pytest.MonkeyPatch) -> Serving:
    """A context in which this process serves with the given `ServerArgs` fields."""
    from sglang.srt import runtime_context
    from sglang.srt.runtime_context import get_context

    loaded = SimpleNamespace(dtype=torch.bfloat16)
    monkeypatch.setattr(runtime_context, "process_model_config", lambda: loaded)

    def with_fields(**fields: Any) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = get_context().override_server_args(**fields)
        return context

    return with_fields


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.bin").write_bytes(bytes(range(256)) * 8)
    return folder


def test_a_model_is_known_by_its_name_and_its_weights(serving: Serving, model: Path) -> None:
    with serving(model_path=str(model)):
        before = model_identity("as-served")
        (model / "model.bin").write_bytes(bytes(256) * 8)
        after = model_identity("as-served")
    assert before.name == after.name == "as-served"
    assert before.fingerprint != after.fingerprint


def test_without_speculative_decoding_there_is_no_draft_model(
    serving: Serving, model: Path
) -> None:
    with serving(model_path=str(model)):
        assert draft_identity(model_identity("m")) is None


def test_a_draft_model_is_known_by_its_own_weights_and_the_targets(
    serving: Serving, model: Path, tmp_path: Path
) -> None:
    draft = tmp_path / "draft"
    draft.mkdir()
    (draft / "model.bin").write_bytes(b"one")
    eagle = {"speculative_algorithm": "EAGLE", "speculative_draft_model_path": str(draft)}
    found = []
    for target, own in ((b"t", b"one"), (b"u", b"one"), (b"t", b"two"), (b"t", b"one")):
        (model / "model.bin").write_bytes(target)
        (draft / "model.bin").write_bytes(own)
        with serving(model_path=str(model), **eagle):
            found.append(draft_identity(model_identity("m")))
    assert None not in found
    assert found[0] == found[3]
    assert found[0] not in found[1:3]
    assert found[1] != found[2]


def test_layers_of_the_targets_own_files_need_no_other_fingerprint(
    serving: Serving, model: Path
) -> None:
    with serving(model_path=str(model), speculative_algorithm="NEXTN"):
        target = model_identity("m")
        draft = draft_identity(target)
    assert draft is not None
    assert draft.lasting
    assert draft.fingerprint == target.fingerprint
    assert draft != target


def test_a_draft_model_that_cannot_be_read_is_this_engines_own(
    serving: Serving, model: Path, tmp_path: Path
) -> None:
    missing = str(tmp_path / "missing")
    with serving(
        model_path=str(model),
        speculative_algorithm="EAGLE",
        speculative_draft_model_path=missing,
    ):
        target = model_identity("m")
        one = draft_identity(target)
        weights.begin()
        other = draft_identity(target)
    assert one is not None
    assert other is not None
    assert target.lasting
    assert not one.lasting
    assert one != other


def test_a_model_without_a_name_goes_by_its_path(serving: Serving, model: Path) -> None:
    with serving(model_path=str(model)):
        assert model_identity(None).name == str(model)
        assert model_identity("").name == str(model)


@pytest.mark.parametrize(
    "changed",
    [
        {"kv_cache_dtype": "fp8_e5m2"},
        {"quantization": "fp8"},
        {"quantization_param_path": "/scales.json"},
        {"json_model_override_args": '{"rope_theta": 1}'},
        {"load_format": "dummy"},
        {"load_format": "layered"},
        {"dsv4_attn_backend": "flashmla_mega"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_setting_that_changes_the_answers_is_another_model(
    changed: dict[str, str], serving: Serving, model: Path
) -> None:
    with serving(model_path=str(model)):
        plain = model_identity("m")
    with serving(model_path=str(model), **changed):
        assert model_identity("m") != plain


def test_what_a_model_computes_in_is_another_model(
    serving: Serving, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What "auto" stands for, too: another engine may take it for something else."""
    from sglang.srt import runtime_context

    with serving(model_path=str(model)):
        plain = model_identity("m")
        loaded = SimpleNamespace(dtype=torch.float16)
        monkeypatch.setattr(runtime_context, "process_model_config", lambda: loaded)
        assert model_identity("m") != plain


@pytest.mark.parametrize(
    "changed",
    [{"load_format": "safetensors"}, {"tp_size": 4}, {"port": 4242}, {"max_total_tokens": 100}],
    ids=lambda changed: next(iter(changed)),
)
def test_a_setting_that_changes_no_answer_keeps_the_pages(
    changed: dict[str, Any], serving: Serving, model: Path
) -> None:
    with serving(model_path=str(model)):
        plain = model_identity("m")
    with serving(model_path=str(model), **changed):
        assert model_identity("m") == plain


def test_the_ordinary_identity_is_the_one_that_stores_hold_already(
    serving: Serving, model: Path
) -> None:
    """A setting enters only where it is set: or every store would be cold after an upgrade, and to another engine."""
    with serving(model_path=str(model)):
        weights.loaded(sources.seen)
        identity = model_identity("m")
    assert identity.lasting
    assert identity.settings == {"dtype": "bfloat16"}
    assert identity.kv_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SGLANG_DSV4_KV_LAYOUT", "v41"),
        ("SGLANG_DSV4_COMPRESSED_KV_LAYOUT", "fp8"),
        ("SGLANG_HIP_DSV41_INDEX_K_PAGE8", "1"),
    ],
)
def test_a_variable_that_orders_the_same_elements_otherwise_is_another_model(
    variable: str, value: str, serving: Serving, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(model_path=str(model)):
        plain = model_identity("m")
        monkeypatch.setenv(variable, value)
        other = model_identity("m")
    assert other != plain
    assert other.lasting == plain.lasting


@pytest.mark.parametrize(
    "fields",
    [
        *(
            {"load_format": name}
            for name in ("presharded", "expert_pack", "remote", "remote_instance", "new")
        ),
        {"weight_cache_mode": "client"},
        {"weight_cache_mode": "daemon"},
        {"model_loader_extra_config": '{"pattern": "/elsewhere/model-rank-{rank}"}'},
        {"modelopt_quant": "fp8"},
        {"quantize_and_serve": True},
        {"quantization_param_path": "/no/such/scales.json"},
        {"kt_weight_path": "/no/such/experts"},
    ],
    ids=str,
)
def test_weights_that_are_not_the_files_are_for_this_engine_only(
    fields: dict[str, Any], serving: Serving, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(model_path=str(model), **fields):
        identity = model_identity("m")
        assert not identity.lasting
        assert model_identity("m") == identity  # on each rank
        weights.begin()
        assert model_identity("m") != identity
    assert len(caplog.records) == 3
    assert "cold after a restart" in caplog.text


@pytest.mark.parametrize(
    "load_format", ["auto", "safetensors", "layered", "runai_streamer", "sharded_state"]
)
def test_weights_that_are_the_files_last(load_format: str, serving: Serving, model: Path) -> None:
    with serving(model_path=str(model), load_format=load_format):
        assert model_identity("m").lasting


@pytest.mark.parametrize(
    "setting",
    [
        "quantization_param_path",
        "rl_quant_profile",
        "modelopt_checkpoint_restore_path",
        "decrypted_config_file",
        "kt_weight_path",
    ],
)
def test_what_lies_beside_the_model_is_known_by_what_is_in_it(
    setting: str, serving: Serving, model: Path, tmp_path: Path
) -> None:
    file, copy = tmp_path / "beside", tmp_path / "copy"

    def served(place: Path, content: bytes) -> ModelIdentity:
        place.write_bytes(content)
        with serving(model_path=str(model), **{setting: str(place)}):
            return model_identity("m")

    require_known_by_content(served(file, b"one"), served(file, b"two"), served(copy, b"one"))


def require_known_by_content(one: Any, other: Any, one_again: Any) -> None:
    """Of what lies somewhere: identities of engines that last, and that are the same where it is."""
    assert one.lasting
    assert other.lasting
    assert one == one_again != other


def test_what_lies_beside_a_draft_model_is_known_by_what_is_in_it(
    serving: Serving, model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    seen = []
    for content in ("{}", '{"rope_theta": 1}'):
        file.write_text(content)
        with serving(
            model_path=str(model),
            speculative_algorithm="NEXTN",
            decrypted_draft_config_file=str(file),
        ):
            seen.append(draft_identity(model_identity("m")))
    assert seen[0] != seen[1]
    assert all(identity is not None and identity.lasting for identity in seen)


def test_a_draft_model_of_random_weights_is_this_engines_own(serving: Serving, model: Path) -> None:
    with serving(
        model_path=str(model),
        speculative_algorithm="EAGLE",
        speculative_draft_model_path=str(model),
        speculative_draft_load_format="remote",
    ):
        target = model_identity("m")
        draft = draft_identity(target)
    assert target.lasting
    assert draft is not None
    assert not draft.lasting


def test_files_that_changed_since_they_were_loaded_name_no_lasting_page(
    serving: Serving, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(model_path=str(model)):
        weights.loaded(sources.seen)
        assert model_identity("m").lasting
        assert caplog.text == ""
        (model / "model.bin").write_bytes(b"newer")
        identity = model_identity("m")
        assert not identity.lasting
    (warning,) = caplog.records
    assert str(model) in warning.getMessage()
    assert "restart" in warning.getMessage()


def test_a_file_of_the_same_content_put_in_the_place_of_another_is_another(
    serving: Serving, model: Path
) -> None:
    """Nobody looked into the one that was loaded."""
    file = model / "model.bin"
    with serving(model_path=str(model)):
        weights.loaded(sources.seen)
        (model / "other").write_bytes(file.read_bytes())
        (model / "other").replace(file)
        assert not model_identity("m").lasting


def test_a_branch_that_moved_on_since_names_no_lasting_page(
    serving: Serving, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "model.bin").write_bytes(b"newer")
    branch = [model]
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(branch[0]))
    with serving(model_path="org/name"):
        weights.loaded(sources.seen)
        assert model_identity("m").lasting
        branch[0] = newer
        assert not model_identity("m").lasting


@pytest.mark.parametrize("what", ["draft", "quantization_param_path", "adapter"])
def test_what_is_loaded_beside_the_model_must_not_have_changed_either(
    what: str, serving: Serving, model: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    file = other / "weights.bin"
    file.write_bytes(b"before")
    known: dict[str, dict[str, Any]] = {
        "draft": {"speculative_algorithm": "EAGLE", "speculative_draft_model_path": str(other)},
        "quantization_param_path": {"quantization_param_path": str(file)},
        "adapter": {"enable_lora": True, "lora_paths": [adapter(other)]},
    }
    with serving(model_path=str(model), **known[what]):
        weights.loaded(sources.seen)
        assert model_identity("m").lasting
        file.write_bytes(b"after")
        assert not model_identity("m").lasting


def test_weights_downloaded_elsewhere_than_their_configuration_are_not_taken_for_the_ones_here(
    serving: Serving, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "model.bin").write_bytes(b"newer")

    def snapshot(name: str, cache_dir: str | None = None, **_: Any) -> str:
        return str(elsewhere if cache_dir == "/downloads" else model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    for folder, lasting in ((None, True), ("/same", True), ("/downloads", False)):
        with serving(model_path="org/name", download_dir=folder):
            assert model_identity("m").lasting == lasting


def adapter(path: Path, *, knows_weights: bool = False) -> Any:
    """As SGLang has it of its command line."""
    from sglang.srt.lora.lora_registry import LoRARef

    named = LoRARef.deterministic_id("one", str(path))
    known = adapter_id(named, str(path)) if knows_weights else named
    return LoRARef(lora_id=known, lora_name="one", lora_path=str(path))


def test_an_adapter_has_the_same_id_in_vllm(tmp_path: Path) -> None:
    """It seeds the hashes of its pages (hicache/page_hashes.py)."""
    from lmcache_sglang.vllm_connector.knowledge import adapter_id as in_vllm

    (tmp_path / "adapter_model.bin").write_bytes(b"trained")
    found = in_vllm("one", str(tmp_path))
    assert found == adapter(tmp_path, knows_weights=True).lora_id
    assert in_vllm("two", str(tmp_path)) != found
    (tmp_path / "adapter_model.bin").write_bytes(b"trained more")
    assert in_vllm("one", str(tmp_path)) != found
    nobody = {in_vllm("one", "/no/such/adapter") for _ in range(2)}
    assert len(nobody) == 2, "weights that nobody looked at are one engine's own"


def test_an_adapter_whose_id_does_not_know_its_weights_enters_with_them(
    serving: Serving, model: Path, tmp_path: Path
) -> None:
    """Of an engine that was started without the flag, or on several nodes: its pages have SGLang's own id."""
    folder = tmp_path / "adapter"
    folder.mkdir()

    def served(content: bytes) -> ModelIdentity:
        (folder / "adapter_model.bin").write_bytes(content)
        with serving(model_path=str(model), enable_lora=True, lora_paths=[adapter(folder)]):
            return model_identity("m")

    require_known_by_content(served(b"trained"), served(b"trained more"), served(b"trained"))


def test_an_adapter_whose_id_knows_its_weights_changes_nothing_else(
    serving: Serving, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.bin").write_bytes(b"trained")
    known = adapter(folder, knows_weights=True)
    with serving(model_path=str(model)):
        plain = model_identity("m")
    with serving(model_path=str(model), enable_lora=True, lora_paths=[known]):
        assert model_identity("m") == plain
        (folder / "adapter_model.bin").write_bytes(b"trained more")  # before SGLang loaded it
        assert model_identity("m") != plain
    with serving(model_path=str(model), enable_lora=False, lora_paths=[known]):
        assert model_identity("m") == plain


def test_with_an_adapter_that_cannot_be_read_pages_are_for_this_engine_only(
    serving: Serving, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    missing = adapter(Path("/no/such/adapter"))
    with serving(model_path=str(model), enable_lora=True, lora_paths=[missing]):
        assert not model_identity("m").lasting
    assert "/no/such/adapter" in caplog.text


def test_an_adapter_that_cannot_be_read_keeps_sglangs_id(sglang: None) -> None:
    assert adapter_id("of SGLang", "/no/such/adapter") == "of SGLang"


def test_every_setting_asked_for_is_one_that_sglang_has(serving: Serving, model: Path) -> None:
    from sglang.srt.runtime_context import get_model

    from lmcache_sglang.hicache.engine import _SETTINGS

    with serving(model_path=str(model)):
        assert all(hasattr(get_model(), name) for name in _SETTINGS)


def test_weights_that_cannot_be_looked_at_are_said_so_and_never_taken_for_others(
    serving: Serving, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    places = [str(tmp_path / "empty"), "nobody/no-such-model", "s3://bucket/model"]
    seen = set()
    for place in places:
        for revision in (None, None, "v2"):
            weights.begin()
            with serving(model_path=place, revision=revision):
                seen.add(model_identity("m").fingerprint)
            assert place in caplog.text
    assert len(seen) == 3 * len(places)
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 3 * len(places)
    assert "cold after a restart" in warnings[0].getMessage()


def test_a_model_by_its_hub_name_is_looked_up_on_this_machine_only(
    serving: Serving, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def snapshot(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with serving(model_path="org/name", revision="v2"):
        by_name = model_identity("m")
    with serving(model_path=str(model)):
        assert by_name == model_identity("m")
    assert asked == [("org/name", {"revision": "v2", "cache_dir": None, "local_files_only": True})]
