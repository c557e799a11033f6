#!/usr/bin/env bash
# All tests, in stages, two at a time: those that start an engine mostly wait for one core, in its imports.
#   units       without an engine
#   vllm-units  of vLLM's connector without an engine, in vLLM's own environment
#   FILE        of tests with the real SGLang, or the real vLLM
# test.sh PYTHON VLLM_PYTHON [pytest arguments: then only what these say]
set -uo pipefail
export PYTHON=$1 VLLM_PYTHON=$2
shift 2
if (($#)); then
  exec "$PYTHON" -m pytest "$@"
fi
LOGS=$(mktemp -d)
export LOGS
trap 'rm -rf "$LOGS"' EXIT

# STAGE: runs it, and says how it ended, since CI has a limit; what it wrote is shown where it failed.
stage() {
  local log=$LOGS/${1//\//-} begun=$SECONDS status
  case $1 in
    units) OMP_NUM_THREADS=1 nice -n 10 "$PYTHON" -m pytest -m "not engine and not vllm" ;;
    vllm-units) OMP_NUM_THREADS=1 "$VLLM_PYTHON" -m pytest tests/vllm_connector ;;
    *) "$PYTHON" -m pytest -m "engine or vllm" "$1" ;;
  esac >"$log" 2>&1
  status=$?
  if ((status)); then
    cat "$log"
  fi
  tail -n 1 "$log"
  echo "$1: status $status after $((SECONDS - begun)) s"
  return "$status"
}
export -f stage

with_engines=$("$PYTHON" -m pytest --collect-only -q -m "engine or vllm" | grep -o '^tests/[^:]*' | uniq)
if [[ -z $with_engines ]]; then
  echo "no test with an engine was found" >&2
  exit 1
fi
# The longest first, so that both have enough to do until the end.
first="units tests/engines/test_direct.py tests/vllm/test_failures.py tests/engines/test_model_families.py"
{
  printf '%s\n' $first
  printf '%s\n' $with_engines | grep -vxF "$(printf '%s\n' $first)"
  echo vllm-units
} | xargs -P 2 -I{} bash -c 'stage {}'
