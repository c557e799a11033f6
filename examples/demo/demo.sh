#!/usr/bin/env bash
# Finds or makes an environment with SGLang, and runs the demo in it: examples/demo/demo.sh --help
#
# Where python3 already has SGLang and a GPU, that SGLang is used, through an environment that sees its
# packages and adds this one (.venv-gpu). Elsewhere .venv-sglang is made, with SGLang for CPU.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}

gpu='import sglang, sys, torch; sys.exit(not torch.cuda.is_available())'
if "$python" -c "$gpu" >/dev/null 2>&1; then
    venv=.venv-gpu
    echo "this machine has a GPU and SGLang: adding this checkout in $venv"
    [ -x "$venv/bin/python" ] || "$python" -m venv --system-site-packages "$venv"
    # If python3 is itself of a virtual environment, the line above sees the packages below it only.
    packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$packages/the-other-one.pth"
    "$venv/bin/python" -m pip --disable-pip-version-check install -q -e .
else
    venv=.venv-sglang
    lmcache_sglang/testing/make_venv.sh sglang "$venv"
fi
exec "$venv/bin/python" examples/demo/run.py "$@"
