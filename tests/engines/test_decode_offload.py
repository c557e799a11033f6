"""A decode instance of a disaggregated deployment stores what it generates; other engines go on from there.

The decode instance is SGLang's own, on CPU. The network between prefill and decode is not:
`testing/handoff.py` brings the prompt's KV from the store. SGLang's `fake` transfer also makes up the first
token, from the request's id.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from lmcache_sglang.testing import handoff
from lmcache_sglang.testing.engine import PAGE_SIZE, Setup, ask, flush, prompt, server

PROMPT = prompt(1)  # whole pages
GENERATED = 5 * PAGE_SIZE + 1
VOCABULARY = 512
RID = "one request"
NO_PREFILL: dict[str, Any] = {
    "bootstrap_host": "2.2.2.2",
    "bootstrap_port": 1,
    "bootstrap_room": 1,
}  # SGLang's FAKE_BOOTSTRAP_HOST
POOL = ("--max-total-tokens", "2048")
DECODE = (
    *("--disaggregation-mode", "decode"),
    *("--disaggregation-transfer-backend", "fake"),
    "--disaggregation-decode-enable-offload-kvcache",
)
LONG = {"temperature": 0, "max_new_tokens": GENERATED, "ignore_eos": True}


def made_up(rid: str) -> int:
    """SGLang's first token of a request without prefill."""
    digest = hashlib.blake2b(rid.encode(), digest_size=8, person=b"fake-pd").digest()
    return int.from_bytes(digest, "little") % VOCABULARY


def test_what_a_decode_instance_generated_is_restored_elsewhere(model: Path, folder: Path) -> None:
    assert len(PROMPT) % PAGE_SIZE == 0
    setup = Setup(folder / "store", args=POOL)
    with server(model, setup, folder / "prefill.log") as engine:
        ask(engine, PROMPT)
        flush(engine)
    decoding = Setup(
        setup.store, args=[*POOL, *DECODE], env=handoff.environment(folder / "handoff")
    )
    with server(model, decoding, folder / "decode.log") as engine:
        answer = ask(engine, PROMPT, rid=RID, sampling_params=LONG, **NO_PREFILL)
        generated = answer.tokens
        log = engine.log
    assert "Enable offload kv cache for decode side" in log
    assert "Traceback" not in log
    assert generated[0] == made_up(RID)
    turn = PROMPT + generated
    setup.forget_memory()
    with server(model, setup, folder / "later.log") as engine:
        restored = ask(engine, turn)
        flush(engine)  # SGLang detaches nothing while pages are being stored
        engine.delete("/hicache/storage-backend")
        right = ask(engine, turn)
        flush(engine)
        alone = ask(engine, [*PROMPT, generated[0]], sampling_params=LONG)
    assert right.storage == 0
    assert generated[1:] == alone.tokens[: GENERATED - 1]
    assert restored.storage == len(PROMPT) + 5 * PAGE_SIZE
    assert restored.tokens == right.tokens
