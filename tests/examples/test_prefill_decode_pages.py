"""What the proxy of examples/prefill_decode believes of the prefill engine's events."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from examples.prefill_decode.stored_pages import DEVICE, STORE, StoredPages, block_names

PAGE = 16
PROMPT = [3 + number * 11 % 500 for number in range(5 * PAGE + 3)]
PAGES = block_names(PROMPT, PAGE)
NO_TIME = 0.01  # seconds; what has been told already takes none


def told(medium: str, blocks: list[int]) -> dict[str, Any]:
    return {
        "type": "BlockStored",
        "block_hashes": blocks,
        "parent_block_hash": None,
        "token_ids": [],
        "block_size": PAGE,
        "lora_id": None,
        "medium": medium,
    }


def removed(medium: str, blocks: list[int]) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": blocks, "medium": medium}


CLEARED = {"type": "AllBlocksCleared"}


def is_stored(*events: dict[str, Any], cached: int = 0) -> bool:
    """Whether the prompt's pages are taken for stored after these events."""

    async def test() -> bool:
        pages = StoredPages()
        await pages.note(msgspec.msgpack.encode([0.0, events, 0]))
        return await pages.wait(PROMPT, cached, NO_TIME)

    return asyncio.run(test())


def test_a_prompt_is_stored_when_the_store_has_all_its_whole_pages() -> None:
    assert len(PAGES) == 5
    assert is_stored(told(STORE, PAGES))
    assert not is_stored(told(STORE, PAGES[:4]))
    assert not is_stored()


def test_pages_on_the_device_alone_are_not_stored() -> None:
    assert not is_stored(told(DEVICE, PAGES))
    assert not is_stored(told("CPU_PINNED", PAGES))


def test_what_was_removed_is_not_stored() -> None:
    assert not is_stored(told(STORE, PAGES), removed(STORE, PAGES[1:2]))
    assert is_stored(told(STORE, PAGES), removed(DEVICE, PAGES))
    assert not is_stored(told(STORE, PAGES), CLEARED)


def test_the_same_tokens_behind_others_are_other_pages() -> None:
    assert not is_stored(told(STORE, block_names([1] * PAGE + PROMPT[PAGE:], PAGE)))


def test_pages_cached_before_anybody_listened_are_taken_for_stored() -> None:
    assert is_stored(told(STORE, PAGES[2:]), cached=2 * PAGE)
    assert not is_stored(told(STORE, PAGES[2:]), cached=2 * PAGE - 1)


def test_pages_that_another_request_computed_just_now_are_waited_for() -> None:
    events = [told(DEVICE, PAGES[:2]), told(STORE, PAGES[2:])]
    assert not is_stored(*events, cached=2 * PAGE)
    assert is_stored(*events, told(STORE, PAGES[:2]), cached=2 * PAGE)


def test_what_is_no_batch_is_told_apart() -> None:
    with pytest.raises(msgspec.DecodeError):
        asyncio.run(StoredPages().note(b"\x93\x01"))


@pytest.mark.usefixtures("sglang")
def test_blocks_are_named_as_sglang_names_them() -> None:
    from sglang.srt.mem_cache.utils import get_hash_str, hash_str_to_int64

    assert [hash_str_to_int64(page) for page in get_hash_str(PROMPT, None, PAGE)][:5] == PAGES
