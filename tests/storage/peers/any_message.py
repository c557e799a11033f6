"""Every message that may be said, for hypothesis."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from lmcache_sglang.storage.peers.messages import (
    FRAME_MOST,
    PAGE_MOST,
    Cancel,
    Credit,
    Expect,
    Get,
    Goodbye,
    Heard,
    Hello,
    NodeRecord,
    Nodes,
    Page,
    Ping,
    Pong,
    Refused,
    Subscribe,
    Summary,
    Without,
)

MOST = (1 << 64) - 1

numbers = st.integers(0, MOST)
smalls = st.integers(0, (1 << 32) - 1)
versions = st.integers(0, (1 << 16) - 1)
names = st.text("abcXYZ019._-", min_size=1, max_size=64)
printable = st.characters(min_codepoint=33, max_codepoint=126)
addresses = st.text(printable, max_size=256)
keys = st.just("") | st.text(printable, min_size=40, max_size=40)
words = st.text(max_size=256)
blobs = st.binary(max_size=300)
records = st.builds(NodeRecord, names, addresses, keys)
digests = st.lists(st.binary(min_size=16, max_size=16), max_size=4)
amounts = st.integers(1, (1 << 40) - 1)
lengths = st.lists(st.integers(1, PAGE_MOST), max_size=8)
frames = st.integers(4096, FRAME_MOST)
epochs = st.integers(1, MOST)

anything: st.SearchStrategy[Any] = st.one_of(
    st.builds(
        Hello,
        versions,
        versions,
        names,
        epochs,
        addresses,
        digests,
        st.lists(words.map(lambda w: w[:32])),
    ),
    st.builds(Refused, words),
    st.builds(Subscribe, numbers, numbers),
    st.builds(Summary, numbers, numbers, smalls, st.booleans(), blobs, blobs, numbers),
    st.builds(Heard, numbers, numbers, smalls),
    st.builds(Ping, numbers),
    st.builds(Pong, numbers, numbers, numbers, numbers),
    st.builds(Nodes, st.lists(records, max_size=5)),
    st.builds(Goodbye),
    st.builds(Get, versions, numbers, blobs, lengths, frames, amounts),
    st.builds(Page, numbers, smalls, numbers, numbers),
    st.builds(Without, numbers, smalls, smalls, st.integers(0, 255)),
    st.builds(Credit, numbers, amounts),
    st.builds(Cancel, numbers),
    st.builds(Expect, versions, blobs, st.integers(1, PAGE_MOST)),
)
