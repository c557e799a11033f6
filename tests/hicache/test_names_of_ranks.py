"""Ranks of one engine name what is temporary alike, and no other engine names anything so.

SGLang's own tree, controller, threads and pools in a process a rank, without a model. Weights that no file holds
(`--load-format remote`) have such a name from the start.
"""

from __future__ import annotations

from typing import Any

from lmcache_sglang.testing.rank_pools import Family
from lmcache_sglang.testing.rank_processes import Nursery

PAGES = 8
FAMILY = Family("mla", 16, ranks=2)  # of which only the first rank stores the KV
TOKENS = list(range(1000, 1000 + PAGES * FAMILY.page_size))


def test_what_the_first_rank_stored_comes_back_to_all_and_to_no_later_engine(
    nursery: Nursery, store: dict[str, Any]
) -> None:
    with nursery.ranks(FAMILY, store, load_format="remote") as ranks:
        ranks.call("write", TOKENS)
        ranks.call("forget")
        assert ranks.call("stored", "kv", TOKENS) == [[True] * PAGES] * 2
        assert ranks.call("restore", TOKENS) == [[len(TOKENS), len(TOKENS), {"kv": True}]] * 2
    with nursery.ranks(FAMILY, store, load_format="remote") as later:
        assert later.call("prefetch", TOKENS) == [0, 0]
        assert later.call("stored", "kv", TOKENS) == [[False] * PAGES] * 2


def test_files_that_were_looked_at_when_the_tree_was_made_keep_their_lasting_name(
    nursery: Nursery, store: dict[str, Any]
) -> None:
    """The control: the plug-in's hook has seen them, and they are as they were."""
    for first in (True, False):
        with nursery.ranks(FAMILY, store) as ranks:
            if first:
                ranks.call("write", TOKENS)
                ranks.call("forget")
            assert ranks.call("restore", TOKENS) == [[len(TOKENS), len(TOKENS), {"kv": True}]] * 2
