#!/usr/bin/env bash
# Installs the lint tools into a virtual environment, once for each set of pins: .ci/tools.sh DIR
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
stamp=$1/lint-tools.txt
cmp -s "$here/lint-tools.txt" "$stamp" && exit 0
echo "lint tools into $1"
log=$1/lint-tools.log
"$1/bin/python" -m pip --disable-pip-version-check install -r "$here/lint-tools.txt" >"$log" 2>&1 || {
    grep -v "is ignored" "$log" | tail -n 30 >&2
    exit 1
}
cp "$here/lint-tools.txt" "$stamp"
