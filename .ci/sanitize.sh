#!/usr/bin/env bash
# The tests that work the native modules hardest, with these built by AddressSanitizer and UBSan, then by
# ThreadSanitizer: .ci/sanitize.sh VENV [asan|tsan]...
#
# The builds lie in build/asan and build/tsan; the environment's own modules stay as they are.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$PWD/$1/bin/python
shift

build() { # NAME FLAGS
    local flags="$2 -g -O1 -fno-omit-frame-pointer" log=build/$1.log
    mkdir -p build
    {
        cmake -S . -B "build/$1" -G Ninja -DCMAKE_BUILD_TYPE=None -DPython_EXECUTABLE="$python" \
            -Dnanobind_DIR="$("$python" -m nanobind --cmake_dir)" \
            -DCMAKE_C_FLAGS="$flags" -DCMAKE_CXX_FLAGS="$flags" &&
            cmake --build "build/$1"
    } >"$log" 2>&1 || { tail -n 40 "$log" >&2; exit 1; }
}

# Python itself is not built by a sanitizer, so its runtime comes first; ASan's wants libstdc++ beside it.
tests() { # NAME RUNTIME TEST...
    local name=$1 runtime=$2 failed
    shift 2
    echo "$name:"
    rm -f "build/$name-report".*
    BUILT=$PWD/build/$name PYTHONPATH=$PWD/.ci/sanitized \
        LD_PRELOAD="$(c++ -print-file-name="$runtime") $(c++ -print-file-name=libstdc++.so.6)" \
        "$python" -m pytest -q -p no:cacheprovider -m "not engine" "$@" || failed=$?
    # What a process that a test expects to die reports counts as well.
    cat "build/$name-report".* >&2 2>/dev/null && failed=1
    return "${failed:-0}"
}

# NVIDIA's compilers do not start beside a sanitizer's runtime; what they compile is emulated by other tests.
not_ours="cuda_build and not cuda_driver"

asan() {
    build asan "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
    # Python's own memory is never all freed; and what its allocator gives out, ASan sees only from malloc.
    # A small quarantine, since tests fork by the hundred, and a process is copied with it.
    export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:quarantine_size_mb=8:log_path=$PWD/build/asan-report
    export UBSAN_OPTIONS=print_stacktrace=1:log_path=$PWD/build/asan-report PYTHONMALLOC=malloc
    tests asan libasan.so tests/kernels tests/storage/test_device.py tests/storage/slab \
        tests/storage/peers/test_{directory,holdings,fetch,frames,wire_fuzz}.py \
        -k "not bad_one_to_die_at and not hammer_one_store and not no_history and not thread_sanitizer and not $not_ours"
}

# Threads of one process; what several processes do to each other TSan does not see.
tsan() {
    build tsan "-fsanitize=thread"
    export TSAN_OPTIONS="suppressions=$PWD/.ci/sanitized/tsan.txt die_after_fork=0"
    TSAN_OPTIONS+=" log_path=$PWD/build/tsan-report"
    export OMP_NUM_THREADS=1 # torch's threads meet in libgomp, of which TSan sees nothing
    tests tsan libtsan.so tests/kernels tests/storage/test_device.py tests/storage/test_chain.py \
        tests/storage/test_keeper.py tests/storage/slab/test_faults.py tests/storage/slab/test_tier.py \
        -k "not TestOnDisk and not while_the_source_changes and not forked_child_copies and not $not_ours"
    # The second one races on purpose; in the third one's child are threads, which TSan does not follow there.
}

for part in "${@:-asan tsan}"; do
    for each in $part; do ("$each"); done
done
