"""The flag, on the real SGLang: nothing without it, everything with it, and clear words in between.

Hooks are for a whole process and for good. So one process imports SGLang, which is slow, and each
scenario runs in a fork of it, where the plug-in is loaded as SGLang loads it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import Any

import pytest

from lmcache_sglang import sglang_plugin
from lmcache_sglang.config import ENVIRONMENT
from lmcache_sglang.sglang_plugin import FLAG, NAME, SEAMS, TESTED
from lmcache_sglang.testing.sglang_cpu.config import VARIABLE

RESOLVE = "sglang.srt.server_args.ServerArgs.resolve_once"
CHOICES = "sglang.srt.server_args.ServerArgs.add_cli_args"

needs_sglang = pytest.mark.skipif(
    find_spec("sglang") is None, reason="SGLang is not installed here"
)

# Reads a scenario a line, prints the JSON of what it left in `result`. `model` is a path.
FORK_SERVER = """
import json, logging, os, pickle, pkgutil, sys, traceback
from argparse import ArgumentParser
from types import SimpleNamespace

import sglang.srt.managers.cache_controller
import sglang.srt.mem_cache.storage.backend_factory
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.server_args import ServerArgs
from lmcache_sglang import sglang_plugin

said = []

class Listener(logging.Handler):
    def emit(self, record):
        said.append([record.levelname, record.name, record.getMessage()])

def args(**fields):
    return ServerArgs(model_path=model, device="cpu", random_seed=1, **fields)

def resolve(server_args):
    "The resolved settings, or the error, as the parent process of an engine meets it."
    try:
        server_args.resolve_once()
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"settings": server_args.resolved_dict()}

def prepared(settings):
    "What the plug-in says to them."
    try:
        sglang_plugin._prepare(settings)
    except Exception as error:
        return str(error)
    return "accepted"

def choices():
    parser = ArgumentParser()
    ServerArgs.add_cli_args(parser)
    flag = "--hicache-storage-backend"
    return next(a.choices for a in parser._actions if flag in a.option_strings)

def run(scenario):
    os.environ.update(scenario["env"])
    logging.getLogger().addHandler(Listener())
    logging.getLogger().setLevel(logging.INFO)
    names = dict(globals())
    exec(scenario["code"], names)
    return {"result": names["result"], "said": said}

for line in sys.stdin:
    ours, theirs = os.pipe()
    if os.fork() == 0:
        try:
            answer = run(json.loads(line))
        except BaseException:
            answer = {"crash": traceback.format_exc()}
        with open(theirs, "w") as pipe:
            json.dump(answer, pipe, default=str)
        os._exit(0)
    os.close(theirs)
    with open(ours) as pipe:
        print(pipe.read(), flush=True)
    os.wait()
"""

Scenario = Callable[..., Any]


class Answer:
    """What a scenario left behind."""

    def __init__(self, result: Any, said: list[tuple[str, str, str]]) -> None:
        self.result = result
        self.said = said  # level, logger and text of each message

    def ours(self, *levels: str) -> list[str]:
        """Messages of this package."""
        return [
            text
            for level, name, text in self.said
            if name.startswith("lmcache_sglang.sglang_plugin") and level in levels
        ]


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scenario]:
    """Runs code in a process with SGLang; `plugins` are those that SGLang may load."""
    folder = tmp_path_factory.mktemp("plugin")
    log = (folder / "stderr.log").open("w")
    code = f"model = {str(tiny_config(folder / 'model'))!r}\n{FORK_SERVER}"
    ours = {VARIABLE: "1", "XDG_CACHE_HOME": str(folder / "cache"), ENVIRONMENT: ""}
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | ours,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    asked, answered = server.stdin, server.stdout

    def run(code: str, plugins: str = NAME, **env: str) -> Answer:
        request = {"code": dedent(code), "env": {"SGLANG_PLUGINS": plugins} | env}
        asked.write(json.dumps(request) + "\n")
        asked.flush()
        answer = json.loads(answered.readline() or '{"crash": "the process is gone"}')
        assert "crash" not in answer, answer["crash"] + Path(log.name).read_text()[-2000:]
        return Answer(answer["result"], answer["said"])

    with log, server:
        yield run
        asked.close()


def tiny_config(folder: Path) -> Path:
    """A model as far as settings are concerned."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# --- with the flag ---


def test_sglang_finds_the_plug_in() -> None:
    (found,) = entry_points(group="sglang.srt.plugins", name=NAME)
    assert found.load() is sglang_plugin.activate


@needs_sglang
def test_the_flag_accepts_the_name_and_keeps_all_others(scenario: Scenario) -> None:
    without = scenario("load_plugins(); result = choices()", plugins="none").result
    with_it = scenario("load_plugins(); result = choices()").result
    assert NAME not in without
    assert with_it == [*without, NAME]


@needs_sglang
def test_the_flag_alone_turns_the_hierarchical_cache_on(scenario: Scenario) -> None:
    answer = scenario(
        """
        load_plugins()
        result = resolve(args(hicache_storage_backend="lmcache"))["settings"]
        """
    )
    assert answer.result["enable_hierarchical_cache"] is True
    assert answer.result["hicache_storage_backend"] == NAME
    assert answer.ours("WARNING", "ERROR") == []


@needs_sglang
def test_the_flag_does_not_turn_it_on_where_a_decode_engine_has_it_off(scenario: Scenario) -> None:
    answer = scenario(
        """
        load_plugins()
        seen = SimpleNamespace(
            hicache_storage_backend="lmcache",
            hicache_storage_backend_extra_config=None,
            enable_hierarchical_cache=False,
            disaggregation_mode="decode",
            nnodes=1,
        )
        sglang_plugin._prepare(seen)
        result = seen.enable_hierarchical_cache
        """
    )
    assert answer.result is False


@needs_sglang
def test_direct_sets_sglangs_flags_for_an_external_linker(scenario: Scenario) -> None:
    answer = scenario(
        """
        load_plugins()
        extra = '{"direct": true, "path": "/a/store", "prefetch_threshold": 64}'
        result = resolve(args(
            hicache_storage_backend="lmcache", hicache_storage_backend_extra_config=extra,
        ))["settings"]
        """
    )
    said = answer.result
    assert said["enable_unified_cache_external_linker"] is True
    assert said["unified_cache_external_linker_backend"] == "dynamic"
    assert said["unified_cache_external_linker_config"] == {
        "linker": "LMCacheLinker",
        "linker_module_path": "lmcache_sglang.hicache.linker",
        "linker_extra_config": {"direct": True, "path": "/a/store", "prefetch_threshold": 64},
    }
    assert said["hicache_storage_backend"] is None
    assert said["hicache_storage_backend_extra_config"] is None
    assert said["enable_hierarchical_cache"] is False
    assert answer.ours("WARNING", "ERROR") == []


@needs_sglang
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("enable_hierarchical_cache", True),
        ("disable_radix_cache", True),
        ("radix_cache_backend", "another"),
        ("enable_lmcache", True),
        ("enable_unified_cache_external_linker", True),
        ("disaggregation_mode", "prefill"),
        ("disaggregation_mode", "decode"),
        ("pp_size", 2),
        ("dcp_size", 2),
        ("dllm_algorithm", "LowConfidence"),
    ],
)
def test_what_direct_does_not_go_with_is_refused_by_name(
    field: str, value: object, scenario: Scenario
) -> None:
    answer = scenario(
        f"""
        load_plugins()
        seen = SimpleNamespace(
            hicache_storage_backend="lmcache",
            hicache_storage_backend_extra_config='{{"direct": true}}',
            enable_hierarchical_cache=False,
            disaggregation_mode="null",
            nnodes=1,
        )
        setattr(seen, {field!r}, {value!r})
        result = prepared(seen)
        """
    )
    flag = f"--{field.replace('_', '-')}"
    assert answer.result.startswith(f"direct: does not go with {flag}, ")
    assert "Leave one of them out" in answer.result


@needs_sglang
def test_a_store_attached_at_run_time_cannot_be_direct(scenario: Scenario) -> None:
    answer = scenario(
        """
        load_plugins()
        try:
            sglang_plugin.create_backend(SimpleNamespace(extra_config={"direct": True}))
        except Exception as error:
            result = str(error)
        """
    )
    assert answer.result.startswith("direct: ")
    assert "take the key out" in answer.result


@needs_sglang
@pytest.mark.parametrize("linker", ["another.module", "lmcache_sglang.hicache.linker"])
def test_a_mistake_in_our_linkers_settings_stops_the_parent_and_in_anothers_is_not_ours(
    linker: str, scenario: Scenario
) -> None:
    answer = scenario(
        f"""
        load_plugins()
        result = resolve(args(
            enable_unified_cache_external_linker=True,
            unified_cache_external_linker_backend="dynamic",
            unified_cache_external_linker_config={{
                "linker": "Any", "linker_module_path": {linker!r}, "linker_extra_config": {{"pth": 1}},
            }},
        ))
        """
    )
    refused = "did you mean path?" in answer.result.get("message", "")
    assert refused == linker.startswith("lmcache")


@needs_sglang
@pytest.mark.parametrize(
    ("field", "value"),
    [("disaggregation_mode", "decode"), ("pp_size", 2), ("enable_lmcache", True)],
)
def test_what_direct_does_not_go_with_is_refused_with_sglangs_own_flags_too(
    field: str, value: object, scenario: Scenario
) -> None:
    answer = scenario(
        f"""
        load_plugins()
        seen = SimpleNamespace(
            hicache_storage_backend=None,
            enable_hierarchical_cache=False,
            enable_unified_cache_external_linker=True,
            unified_cache_external_linker_config={{
                "linker": "LMCacheLinker", "linker_module_path": "lmcache_sglang.hicache.linker",
            }},
            disaggregation_mode="null",
            nnodes=1,
        )
        result = [prepared(seen)]
        setattr(seen, {field!r}, {value!r})
        result.append(prepared(seen))
        """
    )
    accepted, refused = answer.result
    assert accepted == "accepted"
    assert refused.startswith(f"direct: does not go with --{field.replace('_', '-')}, ")


@needs_sglang
def test_a_scheduler_that_never_asks_for_our_pages_is_refused(scenario: Scenario) -> None:
    """And SGLang's own asks for them where it asks for its own prefetches, and nowhere else."""
    answer = scenario(
        """
        import inspect
        from lmcache_sglang import sglang_direct
        from sglang.srt.managers.scheduler import Scheduler
        load_plugins()
        raw = inspect.unwrap(Scheduler._get_new_batch_prefill_raw)
        asked = inspect.getsource(raw).count("self.enable_lmcache")
        gate = "self.enable_hicache_storage or self.enable_lmcache" in inspect.getsource(raw)
        sglang_direct._require_gate()
        Scheduler._get_new_batch_prefill_raw = lambda self: None
        try:
            sglang_direct._require_gate()
            result = "accepted"
        except Exception as error:
            result = [asked, gate, type(error).__name__, str(error)]
        """
    )
    asked, gate, kind, text = answer.result
    assert (asked, gate, kind) == (1, True, "UnsupportedEngineError")
    assert "take direct out" in text


@needs_sglang
@pytest.mark.parametrize(
    ("backend", "layout", "io", "becomes"),
    [
        ("lmcache", "layer_first", "kernel", "page_first"),
        ("mooncake", "layer_first", "kernel", "page_first"),
        ("lmcache", "layer_first", "direct", "page_first_direct"),
        ("mooncake", "layer_first", "direct", "page_first_direct"),
        ("lmcache", "layer_first", "kernel_ascend", "layer_first"),
        ("mooncake", "layer_first", "kernel_ascend", "layer_first"),
        ("lmcache", "page_first", "kernel", "page_first"),
        ("lmcache", "page_first", "direct", "page_first_direct"),  # SGLang's own rule
        ("lmcache", "page_head", "kernel", "page_head"),
        ("file", "layer_first", "kernel", "layer_first"),
        ("file", "layer_first", "direct", "layer_first"),
        (None, "layer_first", "kernel", "layer_first"),
    ],
)
def test_the_layout_becomes_what_it_becomes_for_mooncake(
    backend: str | None, layout: str, io: str, becomes: str, scenario: Scenario
) -> None:
    answer = scenario(
        f"""
        load_plugins()
        result = resolve(args(
            enable_hierarchical_cache=True, hicache_storage_backend={backend!r},
            hicache_mem_layout={layout!r}, hicache_io_backend={io!r},
        ))["settings"]
        """
    )
    assert answer.result["hicache_mem_layout"] == becomes
    assert answer.result["hicache_io_backend"] == io
    changed_by_us = backend == NAME and layout == "layer_first" and becomes != layout
    assert bool(answer.ours("WARNING")) == changed_by_us


@needs_sglang
@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ('{"pth": "/a"}', "did you mean path?"),
        ('{"cpu": {"size": "lots"}}', "cpu.size"),
        ("{", "--hicache-storage-backend-extra-config"),
        ("@/no/such/file.yaml", "/no/such/file.yaml"),
        ('{"cpu": {"size": 0}, "disk": {"size": 0}}', "disk.size"),
    ],
)
def test_a_mistake_in_the_settings_stops_the_parent_before_any_process_starts(
    extra: str, says: str, scenario: Scenario
) -> None:
    answer = scenario(
        f"""
        load_plugins()
        flags = dict(hicache_storage_backend_extra_config={extra!r})
        result = resolve(args(hicache_storage_backend="lmcache", **flags))
        """
    )
    assert answer.result["error"] == "ConfigError"
    assert says in answer.result["message"]


@needs_sglang
@pytest.mark.parametrize("other", sglang_plugin._EXCLUDES)
def test_a_flag_that_does_not_go_with_ours_is_named_with_ours(
    other: str, scenario: Scenario
) -> None:
    """SGLang would name --enable-hierarchical-cache, which the user did not give."""
    answer = scenario(
        f"""
        load_plugins()
        result = resolve(args(hicache_storage_backend="lmcache", {other}=True))
        """
    )
    assert answer.result["error"] == "ConfigError"
    for part in (f"{FLAG} {NAME}", f"--{other.replace('_', '-')}"):
        assert part in answer.result["message"]


@needs_sglang
def test_a_mistake_in_our_own_file_stops_the_parent_too(scenario: Scenario, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("pth: /a\n")
    code = 'load_plugins(); result = resolve(args(hicache_storage_backend="lmcache"))'
    answer = scenario(code, **{ENVIRONMENT: str(file)})
    assert answer.result["error"] == "ConfigError"


@needs_sglang
def test_keys_of_sglang_pass_beside_ours(scenario: Scenario) -> None:
    extra = '{"prefetch_threshold": 64, "tp_lcm_size": 8, "cpu": {"size": "1GiB"}}'
    answer = scenario(
        f"""
        load_plugins()
        flags = dict(hicache_storage_backend_extra_config={extra!r})
        result = resolve(args(hicache_storage_backend="lmcache", **flags))
        """
    )
    assert answer.result["settings"]["hicache_storage_backend_extra_config"] == extra


ADAPTERS = """
from pathlib import Path
def adapter_ids(**flags):
    server_args = args(
        enable_lora=True, lora_paths=["one=" + adapter], max_lora_rank=8,
        lora_target_modules=["q_proj"], **flags,
    )
    server_args.resolve_once()
    server_args.check_server_args()  # which gives adapters their ids
    return [ref["lora_id"] for ref in server_args.resolved_dict()["lora_paths"]]
weights = Path(adapter) / "adapter_model.safetensors"
"""


@pytest.fixture
def adapter(tmp_path: Path) -> str:
    """A LoRA adapter as far as its identity is concerned; the start of a scenario that uses it."""
    (tmp_path / "adapter_config.json").write_text('{"r": 8, "target_modules": ["q_proj"]}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    return f"adapter = {str(tmp_path)!r}\n{ADAPTERS}"


@needs_sglang
def test_an_adapter_trained_anew_under_its_old_path_is_another_one(
    scenario: Scenario, adapter: str
) -> None:
    """Its pages lie under its id; SGLang's own knows only the name and the path."""
    answer = scenario(
        f"""{adapter}
load_plugins()
before = adapter_ids(hicache_storage_backend="lmcache")
again = adapter_ids(hicache_storage_backend="lmcache")
weights.write_bytes(b"trained more")
result = [before, again, adapter_ids(hicache_storage_backend="lmcache")]
"""
    )
    before, again, after = answer.result
    assert before == again
    assert before != after
    assert len(before) == len(after) == 1


@needs_sglang
@pytest.mark.parametrize(
    "flags",
    [
        "",
        'hicache_storage_backend="lmcache", nnodes=2, tp_size=2, dist_init_addr="localhost:1"',
    ],
    ids=["without the flag", "on two nodes"],
)
def test_adapters_keep_sglangs_id_where_all_must_have_the_same(
    flags: str, scenario: Scenario, adapter: str
) -> None:
    """On each node SGLang asks anew, and before a store is attached at run time it did not ask at all."""
    plain = scenario(f"{adapter}\nresult = adapter_ids()", plugins="none").result
    code = f"{adapter}\nload_plugins(); result = adapter_ids({flags})"
    assert scenario(code).result == plain


@needs_sglang
def test_an_adapter_that_cannot_be_read_keeps_sglangs_id(
    scenario: Scenario, adapter: str, tmp_path: Path
) -> None:
    """It may be downloaded later, or lie where only another node sees it."""
    (tmp_path / "adapter_model.safetensors").unlink()
    plain = scenario(f"{adapter}\nresult = adapter_ids()", plugins="none").result
    flag = 'hicache_storage_backend="lmcache"'
    code = f"{adapter}\nload_plugins(); result = [adapter_ids({flag}), adapter_ids({flag})]"
    assert scenario(code).result == [plain, plain]


@needs_sglang
def test_a_store_attached_at_run_time_tells_adapters_apart_by_their_weights_too(
    scenario: Scenario, adapter: str
) -> None:
    """SGLang hashes their pages with an id that does not; so the model's identity does."""
    answer = scenario(
        f"""{adapter}
load_plugins()
from lmcache_sglang.hicache.engine import model_identity
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.runtime_context import get_context
(Path(model) / "model.bin").write_bytes(b"of the model")

def identity():
    (known,) = adapter_ids()
    paths = [LoRARef(lora_id=known, lora_name="one", lora_path=adapter)]
    with get_context().override_server_args(model_path=model, enable_lora=True, lora_paths=paths):
        found = model_identity("m")
    return [known, found.lasting, found.settings]

before, again = identity(), identity()
weights.write_bytes(b"trained more")
result = [before, again, identity()]
"""
    )
    before, again, after = answer.result
    assert before == again
    assert before[:2] == after[:2]
    assert before[1]
    assert before[2] != after[2]


CONTROLLER = """
load_plugins()
from pathlib import Path
from sglang.srt.managers.cache_controller import HiCacheController
from sglang.srt.runtime_context import get_context
from lmcache_sglang.hicache import weights
from lmcache_sglang.hicache.engine import model_identity
file = Path(model) / "model.bin"
file.write_bytes(b"loaded")

def make_controller():
    try:
        HiCacheController(None, None, 64, None, None)
    except AttributeError as error:  # SGLang's own: this is no pool
        return str(error)
"""


@needs_sglang
def test_files_replaced_before_a_store_is_attached_give_no_lasting_name(scenario: Scenario) -> None:
    """SGLang makes its controller when it has loaded the weights, and attaches to it at any time."""
    answer = scenario(
        f"""{CONTROLLER}
with get_context().override_server_args(model_path=model):
    make_controller()
    before = model_identity("m").lasting
    file.write_bytes(b"newer")
    after = model_identity("m").lasting
result = [before, after]
"""
    )
    assert answer.result == [True, False]
    assert (
        len([text for _, _, text in answer.said if "is not what this engine loaded" in text]) == 1
    )


@needs_sglang
def test_a_look_that_fails_leaves_sglang_alone_and_trusts_nothing(scenario: Scenario) -> None:
    code = f"""{CONTROLLER}
with get_context().override_server_args(model_path=model):
    from sglang.srt import runtime_context
    kept = runtime_context.get_model
    BREAK
    why = make_controller()
    runtime_context.get_model = kept
    result = [why, model_identity("m").lasting]
"""
    (why, lasting), (same, trusted) = (
        scenario(code.replace("BREAK", line)).result
        for line in ("pass", "runtime_context.get_model = None")
    )
    assert "'NoneType' object" in why
    assert same == why
    assert lasting
    assert not trusted


@needs_sglang
@pytest.mark.parametrize("backend", [NAME, "file"])
def test_the_ranks_that_attach_are_noted_for_our_name_only(
    backend: str, scenario: Scenario
) -> None:
    answer = scenario(
        f"""
        load_plugins()
        from sglang.srt.managers.cache_controller import HiCacheController
        controller = SimpleNamespace(enable_storage=True, tp_group="these")
        try:
            HiCacheController.attach_storage_backend(controller, {backend!r})
        except RuntimeError:  # SGLang: there is one attached
            result = sglang_plugin._ranks
        """
    )
    assert answer.result == ("these" if backend == NAME else None)


@needs_sglang
def test_the_factory_makes_our_backend_for_our_name_only(scenario: Scenario) -> None:
    """The seam of start and of the admin route alike."""
    answer = scenario(
        """
        load_plugins()
        from sglang.srt.mem_cache.storage import StorageBackendFactory
        made = []
        sglang_plugin.create_backend = lambda config: made.append(config) or "ours"
        class Theirs:
            def __init__(self, *given): self.given = given
        create = StorageBackendFactory._create_builtin_backend
        result = [
            StorageBackendFactory.create_backend("lmcache", "config", "pool"),
            made,
            type(create("file", Theirs, "config", "pool")).__name__,
            create("mooncake", Theirs, "config", "pool").given,
        ]
        """
    )
    assert answer.result == ["ours", ["config"], "Theirs", ["config", "pool"]]


@needs_sglang
def test_attaching_selects_the_zero_copy_calls(scenario: Scenario) -> None:
    """At the start and on the admin route; SGLang itself would have chosen the generic ones."""
    answer = scenario(
        """
        from sglang.srt.managers.cache_controller import HiCacheController
        def attach(self, storage_backend, prefetch_threshold=256, **more):
            self.storage_backend_type = storage_backend
            self.page_get_func, self.page_set_func = self._generic_page_get, self._generic_page_set
        HiCacheController.attach_storage_backend = attach
        load_plugins()
        def attached(name):
            controller = object.__new__(HiCacheController)
            controller.attach_storage_backend(storage_backend=name, model_name="m")
            return [controller.page_get_func.__name__, controller.page_set_func.__name__]
        result = [attached("lmcache"), attached("dynamic")]
        """
    )
    ours, theirs = answer.result
    assert ours == ["_page_get_zero_copy", "_page_set_zero_copy"]
    assert theirs == ["_generic_page_get", "_generic_page_set"]


@needs_sglang
@pytest.mark.parametrize(
    ("backend", "was_attached", "undone"),
    [(NAME, False, True), (NAME, True, False), ("mooncake", False, False)],
)
def test_an_attach_that_fails_half_way_is_undone(
    backend: str, was_attached: bool, undone: bool, scenario: Scenario
) -> None:
    """The KV pool was taken, threads run, and the second pool is refused. One that was attached before stays."""
    answer = scenario(
        f"""
        from sglang.srt.managers.cache_controller import HiCacheController
        from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
        from sglang.srt.mem_cache.memory_pool_host import LogicalHostPool
        def attach(self, storage_backend, **_):
            if self.enable_storage:
                raise RuntimeError("already attached")
            self.enable_storage, self.storage_backend_type = True, storage_backend
        def refuse(*_):
            raise ValueError("no room")
        detached = []
        def detach(self):
            self.enable_storage = False
            detached.append(self.storage_backend_type)
        HiCacheController.attach_storage_backend = attach
        HybridCacheController.detach_storage_backend = detach
        load_plugins()
        controller = object.__new__(HybridCacheController)
        controller.storage_host_pool, controller.host_memory_mode = None, "cache"
        controller.pp_prefetch_command_group = None
        controller.enable_storage, controller.storage_backend_type = {was_attached}, {backend!r}
        controller.storage_backend = SimpleNamespace(register_mem_host_pool_v2=refuse)
        anchor = LogicalHostPool(64, 16, "page_first")
        pool = SimpleNamespace(host_pool=anchor, name="kv", is_primary_index_anchor=True)
        try:
            controller.attach_storage_backend(storage_backend={backend!r}, host_pools=[pool])
        except (ValueError, RuntimeError) as error:
            why = str(error)
        result = [detached, why]
        """
    )
    why = "already attached" if was_attached else "no room"
    assert answer.result == [[NAME] if undone else [], why]


@needs_sglang
@pytest.mark.parametrize(
    ("tags", "backup", "lost"),
    [
        (None, False, True),
        (["weights"], False, True),
        (["kv_cache"], False, False),
        (None, True, False),
    ],
)
def test_weights_whose_memory_was_released_are_not_those_of_the_files(
    tags: list[str] | None, backup: bool, lost: bool, scenario: Scenario
) -> None:
    """What is computed before the next update must not be taken for theirs."""
    answer = scenario(
        f"""
        from sglang.srt import runtime_context
        from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager
        SchedulerWeightUpdaterManager.resume_memory_occupation = lambda self, request: "resumed"
        load_plugins()
        features = SimpleNamespace(enable_weights_cpu_backup={backup})
        runtime_context.get_exec = lambda: SimpleNamespace(features=features)
        from lmcache_sglang.hicache import weights
        before = weights.epoch()
        updater = object.__new__(SchedulerWeightUpdaterManager)
        done = updater.resume_memory_occupation(SimpleNamespace(tags={tags!r}))
        result = [before, done, weights.epoch() != ""]
        """
    )
    assert answer.result == ["", "resumed", lost]


@needs_sglang
@pytest.mark.parametrize(("backend", "passes"), [(NAME, False), ("mooncake", True)])
def test_pools_whose_pages_cannot_be_reached_are_refused_before_anything_starts(
    backend: str, passes: bool, scenario: Scenario
) -> None:
    """A KV pool without memory is not one that merely gives out indices."""
    answer = scenario(
        f"""
        from sglang.srt.managers.cache_controller import HiCacheController
        from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
        started = []
        HiCacheController.attach_storage_backend = lambda *_, **__: started.append(True)
        load_plugins()
        controller = object.__new__(HybridCacheController)
        controller.storage_host_pool, controller.host_memory_mode = None, "cache"
        controller.storage_backend = SimpleNamespace(
            register_mem_host_pool_v2=lambda *_: None, on_host_pools_registered=lambda: None
        )
        elsewhere = SimpleNamespace(kv_buffer=None, page_size=16, dcp_size=1)
        pool = SimpleNamespace(host_pool=elsewhere, name="kv", is_primary_index_anchor=True)
        why = None
        try:
            controller.attach_storage_backend(storage_backend={backend!r}, host_pools=[pool])
        except Exception as error:
            why = type(error).__name__
        result = [bool(started), why]
        """
    )
    assert answer.result == [passes, None if passes else "UnsupportedEngineError"]


@needs_sglang
@pytest.mark.parametrize(
    ("backend", "extra", "page_size", "passed"),
    [
        (NAME, None, 16, True),
        (NAME, None, 1, False),
        (NAME, '{"cpu": {"size": 0}}', 64, True),
        (NAME, '{"hicache_storage_pass_prefix_keys": false}', 16, False),
        (NAME, '{"hicache_storage_pass_prefix_keys": true}', 1, True),
        (NAME, "@FILE", 16, False),
        ("mooncake", None, 16, False),
        ("mooncake", '{"hicache_storage_pass_prefix_keys": true}', 16, True),
    ],
)
def test_hashes_of_the_pages_before_are_passed_unless_the_user_says_no(
    backend: str,
    extra: str | None,
    page_size: int,
    passed: bool,
    scenario: Scenario,
    tmp_path: Path,
) -> None:
    """A start and the admin route both lead through SGLang's own parser and its own last step."""
    (tmp_path / "extra.yaml").write_text("hicache_storage_pass_prefix_keys: false\n")
    given = extra and extra.replace("FILE", str(tmp_path / "extra.yaml"))
    answer = scenario(
        f"""
        load_plugins()
        from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
        from sglang.srt.mem_cache.unified_cache.storage_attachment import StorageAttachment
        class Controller: pass
        class Cache:
            enable_storage, page_size, cache_controller = True, {page_size}, Controller()
        cache = Cache()
        attachment = StorageAttachment(cache)
        parsed = HybridCacheController.parse_storage_backend_extra_config({given!r})
        attachment.apply_runtime_config(
            storage_backend={backend!r}, prefetch_threshold=parsed[1],
            prefetch_timeout_base=parsed[2], prefetch_timeout_per_ki_token=parsed[3],
            hicache_storage_pass_prefix_keys=parsed[4], enable_storage=True,
            enable_storage_metrics=False, extra_metric_labels=None,
        )
        result = cache.hicache_storage_pass_prefix_keys
        """
    )
    assert answer.result is passed


READ = """
        load_plugins()
        from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle
        from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import (
            HybridCacheController, PrefetchOperation,
        )
        from sglang.srt.mem_cache.unified_cache.storage_attachment import StorageAttachment
        from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
        from lmcache_sglang.hicache import patience
        seen = []
        def look():
            limits = patience.current()
            seen.append(round(limits.left(own=1000.0)))
            cancels.append(limits.cancel)
        cancels = []
        class Controller(HybridCacheController):
            storage_backend_type = "{backend}"
            def __init__(self): pass
            def _page_transfer_kv_batch(self, operation, *_):
                look()
                {then}
                return 8
            def _sync_trailing_keys(self, *_): pass
            def _resolve_sidecar_nonkv_derived_pool_transfers(self, _): pass
            storage_backend = SimpleNamespace(batch_get_v2=lambda *_, **__: look() or {})
            page_size = 16
            prefetch_sync_queue = __import__("queue").Queue()
            mem_pool_host = SimpleNamespace(layout_lease=__import__("contextlib").nullcontext)
        controller = Controller()
        class Cache:
            enable_storage, page_size, cache_controller = True, 16, controller
            prefetch_stop_policy, _storage_prefetch_wait = "timeout", {}
        cache = Cache()
        StorageAttachment(cache).apply_runtime_config(
            storage_backend="{backend}", prefetch_threshold=256, prefetch_timeout_base=2.0,
            prefetch_timeout_per_ki_token=64.0, hicache_storage_pass_prefix_keys=False,
            enable_storage=True, enable_storage_metrics=False, extra_metric_labels=None,
        )
        operation = PrefetchOperation(CacheRequestHandle("r", 0), [], None)
        operation.hash_value, operation.host_indices = ["00"] * 8, list(range(128))
        operation.pool_transfers = [PoolTransfer(PoolName.MAMBA, keys=["00"])]
        controller._page_transfer(operation)
        result = [seen, [cancel is not None and cancel.is_set() for cancel in cancels]]
        """


def a_read(backend: str, then: str) -> str:
    """A read of KV and a state through SGLang's own controller, 8 pages of 16 tokens, with a budget of 2 s and 64 s
    a Ki-token; what is left of it at each call of the backend, and whether that is given up."""
    return READ.replace("{backend}", backend).replace("{then}", then)


@needs_sglang
@pytest.mark.parametrize(
    ("backend", "wanted"), [(NAME, [[10], [True]]), ("file", [[1000], [False]])]
)
def test_a_read_has_sglangs_budget_and_ends_when_sglang_gives_it_up(
    backend: str, wanted: list[object], scenario: Scenario
) -> None:
    assert scenario(a_read(backend, "operation.mark_terminate()")).result == wanted


@needs_sglang
@pytest.mark.parametrize(("backend", "left"), [(NAME, [10, 1000]), ("file", [1000, 1000])])
def test_a_state_is_waited_for_once_the_kv_is_there(
    backend: str, left: list[int], scenario: Scenario
) -> None:
    """As SGLang itself waits: without it the KV is of no use."""
    assert scenario(a_read(backend, "pass")).result == [left, [False, False]]


@needs_sglang
@pytest.mark.parametrize("made", [True, False])
def test_the_speed_of_the_engine_is_noted_where_it_is_of_use(
    made: bool, scenario: Scenario
) -> None:
    answer = scenario(
        f"""
        load_plugins()
        from sglang.srt.managers.scheduler_components.metrics_reporter import (
            PrefillStats, SchedulerMetricsReporter,
        )
        from lmcache_sglang import sglang_plugin
        from lmcache_sglang.hicache import recompute
        if {made}:
            sglang_plugin._BACKEND_MADE.set()
        batch = SimpleNamespace(launch_ts=__import__("time").monotonic() - 1.0)
        stats = SimpleNamespace(log_input_tokens=5000)
        quiet = SimpleNamespace(is_stats_logging_rank=False, current_scheduler_metrics_enabled=False)
        SchedulerMetricsReporter.report_prefill_stats(quiet, batch, stats, False)
        SchedulerMetricsReporter.report_prefill_stats(
            quiet, batch=batch, prefill_stats=stats, can_run_cuda_graph=False
        )
        result = [recompute._prefill.seen, recompute._prefill.seconds_of(5000)]
        """
    )
    tokens, seconds = answer.result
    assert tokens == (10_000 if made else 0)
    assert seconds == pytest.approx(1.0 if made else 0.0, abs=0.2)


@needs_sglang
def test_activating_twice_is_activating_once(scenario: Scenario) -> None:
    answer = scenario(
        """
        sglang_plugin.activate()
        load_plugins()
        sglang_plugin.activate()
        HookRegistry.apply_hooks()
        result = [choices(), resolve(args(
            hicache_storage_backend="lmcache", hicache_mem_layout="layer_first"
        ))["settings"]["hicache_mem_layout"]]
        """
    )
    offered, layout = answer.result
    assert offered.count(NAME) == 1
    assert layout == "page_first"
    assert len(answer.ours("WARNING")) == 1


# --- without the flag ---


@needs_sglang
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"enable_hierarchical_cache": True},
        {
            "enable_hierarchical_cache": True,
            "hicache_storage_backend": "file",
            "hicache_mem_layout": "layer_first",
        },
        {
            "enable_hierarchical_cache": True,
            "hicache_storage_backend": "mooncake",
            "hicache_storage_backend_extra_config": '{"not": "ours"}',
        },
    ],
    ids=["plain", "hicache", "file", "mooncake"],
)
def test_nothing_changes_for_who_does_not_use_the_flag(
    fields: dict[str, Any], scenario: Scenario
) -> None:
    code = f"load_plugins(); result = resolve(args(**{fields!r}))['settings']"
    with_it = scenario(code, **{ENVIRONMENT: "/no/such/file"})  # which would stop who uses it
    without = scenario(code, plugins="none")
    assert with_it.result == without.result
    assert len(with_it.result) > 100
    assert with_it.ours("WARNING", "ERROR", "INFO") == []


# --- another SGLang ---


@needs_sglang
def test_every_seam_is_there_in_the_version_that_was_tested(scenario: Scenario) -> None:
    answer = scenario("result = [sglang_plugin.missing_seams(), sglang_plugin.version('sglang')]")
    missing, running = answer.result
    assert missing == []
    assert running in TESTED


@needs_sglang
def test_nothing_is_hooked_that_is_not_looked_for_first(scenario: Scenario) -> None:
    answer = scenario("sglang_plugin.activate(); result = sorted(HookRegistry._hooks)")
    assert len(answer.result) >= 5
    # A method that a class inherits is looked for as that class.
    sought = {hook if hook in SEAMS else hook.rpartition(".")[0] for hook in answer.result}
    assert sought <= set(SEAMS)


@needs_sglang
@pytest.mark.parametrize("seam", SEAMS)
def test_a_missing_seam_stops_who_uses_the_flag_and_nobody_else(
    seam: str, scenario: Scenario
) -> None:
    answer = scenario(
        f"""
        seam = {seam!r}
        owner, name = pkgutil.resolve_name(seam.rpartition(".")[0]), seam.rpartition(".")[2]
        kept = getattr(owner, name)
        delattr(owner, name)
        sglang_plugin.activate()
        hooked = sorted(HookRegistry._hooks)
        from sglang.srt.mem_cache.storage import StorageBackendFactory
        registered = "lmcache" in StorageBackendFactory._registry
        setattr(owner, name, kept)  # SGLang itself could not run without it
        HookRegistry.apply_hooks()
        result = [
            resolve(args(hicache_storage_backend="lmcache")),
            resolve(args(enable_hierarchical_cache=True)),
            hooked,
            registered,
        ]
        """
    )
    with_flag, without_flag, hooked, registered = answer.result
    assert "settings" in without_flag
    assert not registered
    assert set(hooked) == {CHOICES, RESOLVE} - {seam}
    if seam == RESOLVE:  # then only the log can say it, and SGLang refuses the name by itself
        (said,) = answer.ours("ERROR")
    else:
        assert with_flag["error"] == "UnsupportedEngineError"
        said = with_flag["message"]
    assert seam in said
    assert f"tested on SGLang {', '.join(TESTED)}" in said


@needs_sglang
def test_a_module_that_is_gone_is_a_missing_seam(scenario: Scenario) -> None:
    answer = scenario(
        """
        sys.modules["sglang.srt.arg_groups.hicache_hook"] = None
        result = sglang_plugin.missing_seams()
        """
    )
    assert answer.result == [
        "sglang.srt.arg_groups.hicache_hook.resolve_storage_layout_compatibility"
    ]


def test_a_seam_whose_module_cannot_be_imported_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An SGLang of which a dependency is missing has every seam, and none can be had."""
    package = tmp_path / "an_engine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "tree.py").write_text("import not_installed_here\nclass Tree: pass\n")
    (package / "whole.py").write_text("class Tree: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    seams = ("an_engine.tree.Tree", "an_engine.whole.Tree.cut", "an_engine.whole.Tree")
    monkeypatch.setattr(sglang_plugin, "SEAMS", seams)
    assert sglang_plugin.missing_seams() == [
        "an_engine.tree.Tree (ModuleNotFoundError: No module named 'not_installed_here')",
        "an_engine.whole.Tree.cut",
    ]


@needs_sglang
def test_an_untested_version_is_warned_of_once_and_goes_on(scenario: Scenario) -> None:
    answer = scenario(
        """
        sglang_plugin.version = lambda name: "0.5.99"
        load_plugins()
        flags = args(hicache_storage_backend="lmcache")
        parent = resolve(flags)["settings"]
        child = resolve(pickle.loads(pickle.dumps(flags)))["settings"]
        result = [parent == child, parent["hicache_storage_backend"]]
        """
    )
    assert answer.result == [True, NAME]
    (warning,) = answer.ours("WARNING")
    assert "0.5.99" in warning
    assert TESTED[0] in warning


@needs_sglang
def test_an_untested_version_is_nothing_to_who_does_not_use_the_flag(scenario: Scenario) -> None:
    answer = scenario(
        """
        sglang_plugin.version = lambda name: "0.5.99"
        load_plugins()
        result = resolve(args(enable_hierarchical_cache=True))
        """
    )
    assert "settings" in answer.result
    assert answer.ours("WARNING", "ERROR", "INFO") == []


# --- the hooks by themselves ---


def test_zero_copy_is_selected_for_our_name_only() -> None:
    def controller(backend: str) -> SimpleNamespace:
        return SimpleNamespace(
            storage_backend_type=backend,
            page_get_func="generic get",
            page_set_func="generic set",
            _page_get_zero_copy="zero-copy get",
            _page_set_zero_copy="zero-copy set",
        )

    ours, theirs = controller(NAME), controller("dynamic")
    for each in (ours, theirs):
        sglang_plugin._select_zero_copy(None, each, each.storage_backend_type, model_name="m")
    assert (ours.page_get_func, ours.page_set_func) == ("zero-copy get", "zero-copy set")
    assert (theirs.page_get_func, theirs.page_set_func) == ("generic get", "generic set")


def test_a_call_that_has_grown_still_reaches_the_backend_it_was_for() -> None:
    """Another SGLang may pass more; who uses another backend must not notice us."""

    def original(*given: object, **named: object) -> object:
        return given, named

    given = (type, "file", object, "config", "pool", "more")
    assert sglang_plugin._create(original, *given, new=1) == (given, {"new": 1})


@pytest.mark.parametrize("hook", [sglang_plugin._prepare, sglang_plugin._select_zero_copy])
def test_settings_without_the_field_are_not_ours(hook: Callable[..., None]) -> None:
    """Another SGLang may have renamed it; then nobody can use the flag, and all others go on."""
    first = () if hook is sglang_plugin._prepare else (None,)
    hook(*first, SimpleNamespace(), "more", new=1)


def test_only_the_flags_own_choices_grow() -> None:
    parser = ArgumentParser()
    flag = parser.add_argument(FLAG, choices=["file"])
    other = parser.add_argument("--other", choices=["file"])
    free = parser.add_argument("--free")
    sglang_plugin._add_choice(None, parser)
    sglang_plugin._add_choice(None, parser)
    assert flag.choices == ["file", NAME]
    assert other.choices == ["file"]
    assert free.choices is None


def test_a_flag_that_takes_any_name_is_left_alone() -> None:
    parser = ArgumentParser()
    flag = parser.add_argument(FLAG)
    sglang_plugin._add_choice(None, parser)
    assert flag.choices is None


def test_the_refusal_names_the_seams_and_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_plugin, "version", {"sglang": "9.9", "lmcache-sglang": "0.1"}.get)
    message = sglang_plugin.unsupported(["a.b", "c.d"])
    for part in ("9.9", "0.1", "a.b, c.d", TESTED[0], f"{FLAG} {NAME}"):
        assert part in message
