"""Our store beside its peers and the machine's limits, all in one run. `python -m benchmarks --help`.

catalog.py   the subjects: which class, which environment, with how many threads
subjects/    one file each; ours.py is all that is known here about our own store
worker.py    the process a subject lives in; wire.py: the lines it is driven by
crew.py      its side in the harness: one or several workers that start at the same moment
plan.py      what is measured with --quick, by default, with --full
rounds.py    interleaved rounds; every page read is compared
reopen.py    what is still there after a restart, and how soon
growth.py    what lookup, insert and eviction cost as the index grows
results.py   what was measured, as JSON; targets.py, report.py, plot.py read it
machine.py   where it was measured
peers/       the environments of the peers, pinned
"""
