"""Pages of another process on this machine, over TCP on loopback: `make bench ARGS=--sharing`.

    python -m benchmarks.sharing --quick
    python -m benchmarks.sharing --subjects raw,mooncake --pages 2m --rounds 9 --out /tmp/bench

For each subject one process, the holder, has the pages in memory, and another, the getter, brings them into memory
that it has touched before and uses again. A round blanks that memory, gets every page in batches as HiCache does
(timed), and compares every byte. Subjects take turns within a round, and ratios are of one round. The processor time
of either side is counted as well: on few cores it says why a subject is as fast as it is.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import environments, machine, sharing_report
from benchmarks.catalog import ROOT, SGLANG_VENV, Spec
from benchmarks.crew import Crew, Size, in_turn
from benchmarks.sharing_report import Failed, Measured, Shared, Subject

KIB, MIB = 1 << 10, 1 << 20
SIZES = (256 * KIB, 2 * MIB, 8 * MIB)
QUICK_SIZES = (2 * MIB,)
ROUND_BYTES = 256 * MIB
BATCH_PAGES, BATCH_BYTES = 64, 128 * MIB  # the most of one call, as HiCache reads
ROUNDS, QUICK_ROUNDS = 7, 5
OURS = "lmcache_sglang.storage.peers.tier"
MEMORY = Path("/dev/shm")
Say = Callable[[str], None]

_MOONCAKE = {
    "MC_STORE_MEMCPY": "0",
    "MC_TCP_ENABLE_CONNECTION_POOL": "1",
    "MC_TCP_SLICE_SIZE": str(1 << 20),
}
SPECS = (
    Spec(sharing_report.LIMIT, "raw", "tcp", "sharing_raw", "RawTcp", "sglang"),
    Spec(sharing_report.HASHED, "raw", "tcp", "sharing_raw", "RawTcpHashed", "sglang"),
    Spec("ours", "ours", "tcp", "sharing_ours", "Ours", "sglang"),
    Spec("ours, CURVE, 1 stream", "ours", "tcp", "sharing_ours", "OursCurve", "sglang"),
    Spec("ours, CURVE, 2 streams", "ours", "tcp", "sharing_ours", "OursCurve", "sglang", threads=2),
    Spec("ours, CURVE, 4 streams", "ours", "tcp", "sharing_ours", "OursCurve", "sglang", threads=4),
    Spec("Mooncake", "mooncake", "tcp", "sharing_mooncake", "Mooncake", "mooncake", env=_MOONCAKE),
    Spec("PeerCache", "peercache", "tcp", "sharing_peercache", "PeerCache", "peercache"),
    Spec(
        "PeerCache, 2 threads",
        "peercache",
        "tcp",
        "sharing_peercache",
        "PeerCache",
        "peercache",
        threads=2,
        split=True,
    ),
)
FAMILIES = tuple(dict.fromkeys(spec.family for spec in SPECS))


def run(sizes: Sequence[int], rounds: int, families: Sequence[str], out: Path, say: Say) -> None:
    """Measure, and write `sharing.json` and `sharing.md`."""
    measured = Shared(machine.describe(out if out.exists() else ROOT), rounds, ROUND_BYTES)
    specs = _ready([spec for spec in SPECS if spec.family in families], measured, say)
    memory = MEMORY if os.access(MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="bench-", dir=memory) as place:
        for page_bytes in sizes:
            _Cell(page_bytes, specs, Path(place), measured, say).measure(rounds)
    sharing_report.write(measured, out)
    say(f"done: {out / 'sharing.md'}")


def _ready(specs: Sequence[Spec], measured: Shared, say: Say) -> list[Spec]:
    """Those whose environment is there or can be made."""
    missing: dict[str, str] = {}
    for venv in {spec.venv for spec in specs if spec.directory != SGLANG_VENV}:
        reason = environments.make(venv)
        if reason:
            missing[venv] = reason
    if importlib.util.find_spec(OURS) is None:
        missing["ours"] = "not there yet"
    ready = []
    for spec in specs:
        why = missing.get(spec.venv) or missing.get(spec.family)
        if why is None:
            ready.append(spec)
        else:
            say(f"{spec.name}: {why}")
            measured.failed.append(Failed(spec.name, 0, why))
    return ready


@dataclass
class _Values:
    """One subject's, a value a round."""

    rates: list[float] = field(default_factory=list)
    getter: list[float] = field(default_factory=list)
    holder: list[float] = field(default_factory=list)


class _Cell:
    """All subjects with pages of one size."""

    def __init__(
        self, page_bytes: int, specs: Sequence[Spec], place: Path, measured: Shared, say: Say
    ) -> None:
        pages = max(1, ROUND_BYTES // page_bytes)
        batch = max(1, min(BATCH_PAGES, BATCH_BYTES // page_bytes))
        self._size = Size(page_bytes, pages, batch)
        self._place = place / str(page_bytes)
        self._specs = specs
        self._measured = measured
        self._say = say
        self._values: dict[str, _Values] = defaultdict(_Values)
        self._crews: dict[str, Crew] = {}  # those that have not failed

    def measure(self, rounds: int) -> None:
        """The round before the first is measured like the others and thrown away."""
        self._say(f"pages of {sharing_report.size_of(self._size.page_bytes)}")
        try:
            for spec in self._specs:
                self._crews[spec.name] = Crew(spec, self._size, self._place / spec.slug)
            self._each(self._open)
            for turn in range(-1, rounds):
                self._each(lambda crew, turn=turn: self._round(crew, turn), turn)  # type: ignore[misc]
                self._say("  warmed up" if turn < 0 else f"  round {turn + 1} of {rounds}")
            self._each(lambda crew: crew.do("close"))
        finally:
            for crew in self._crews.values():
                crew.hang_up()
            for crew in self._crews.values():
                crew.end()
        for name, each in self._values.items():
            if len(each.rates) == rounds:
                values = (each.rates, each.getter, each.holder)
                self._measured.cells.append(Measured(name, self._size.page_bytes, *values))

    def _each(self, action: Callable[[Crew], object], turn: int = 0) -> None:
        """With every crew in turn, the first one being another each time."""
        in_turn(self._crews, action, turn, self._leave_out)

    def _leave_out(self, name: str, reason: str) -> None:
        self._say(f"  {name}: {reason}")
        failed = Failed(name, self._size.page_bytes, reason.replace(f"{ROOT}/", ""))
        self._measured.failed.append(failed)
        self._crews.pop(name).end()

    def _open(self, crew: Crew) -> None:
        about = crew.open()
        crew.begin("sharing")
        crew.time("put")
        subject = Subject(crew.spec.name, about["version"], about["setup"])
        if subject not in self._measured.subjects:
            self._measured.subjects.append(subject)

    def _round(self, crew: Crew, turn: int) -> None:
        """Blank, get, compare."""
        crew.do("blank")
        before = crew.do("spent")[0]
        seconds = crew.time("get")
        after = crew.do("spent")[0]
        crew.do("verify")
        if turn < 0:
            return
        values, billions = self._values[crew.spec.name], crew.bytes / 1e9
        values.rates.append(billions / seconds)
        values.getter.append((after["worker"] - before["worker"]) / billions)
        values.holder.append((after["servers"] - before["servers"]) / billions)


def _size(text: str) -> int:
    """256k, 2m: bytes."""
    units = {"k": KIB, "m": MIB}
    if not text[:-1].isdigit() or text[-1].lower() not in units:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 256k or 2m")
    return int(text[:-1]) * units[text[-1].lower()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sharing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="one page size, fewer rounds")
    parser.add_argument(
        "--pages",
        type=lambda text: [_size(word) for word in text.split(",")],
        metavar="A,B",
        help="sizes of pages (default 256k,2m,8m)",
    )
    parser.add_argument("--rounds", type=int, help="measured rounds, instead of the mode's")
    parser.add_argument(
        "--subjects",
        type=lambda text: text.split(","),
        default=FAMILIES,
        metavar="A,B",
        help="of " + ", ".join(FAMILIES),
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "benchmarks", help="folder of sharing.md"
    )
    parser.add_argument("--report", action="store_true", help="measure nothing, write the page")
    return parser


def main() -> None:
    parser = _parser()
    options = parser.parse_args()
    unknown = set(options.subjects) - set(FAMILIES)
    if unknown:
        parser.error(f"no such subjects: {', '.join(sorted(unknown))}")
    if options.report:
        kept = (options.out / "sharing.json").read_text()
        sharing_report.write(sharing_report.loaded(kept), options.out)
        return
    sizes = options.pages or (QUICK_SIZES if options.quick else SIZES)
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    run(sizes, rounds, options.subjects, options.out, lambda text: print(text, flush=True))


if __name__ == "__main__":
    main()
