#!/usr/bin/env bash
# All tests, in two tracks. Those that start engines mostly wait for one core, in SGLang's imports; the others run
# beside them, and after these the engines of `behind`, so that both tracks take about as long.
# test.sh PYTHON [pytest arguments: then only what these say]
set -uo pipefail
python=$1
shift
if (($#)); then
  exec "$python" -m pytest "$@"
fi
behind=tests/engines/test_direct_engines.py
log=$(mktemp)
trap 'rm -f "$log"' EXIT
echo "the tests without an engine, and then $behind, run beside the other engines; what they said comes at the end"
{
  OMP_NUM_THREADS=1 nice -n 10 "$python" -m pytest -m "not engine"
  units=$?
  "$python" -m pytest -m engine "$behind"
  later=$?
  exit $((units > later ? units : later))
} >"$log" 2>&1 &
others=$!
"$python" -m pytest -m engine --ignore="$behind"
engines=$?
wait "$others"
rest=$?
cat "$log"
exit $((engines > rest ? engines : rest))
