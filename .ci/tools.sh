#!/usr/bin/env bash
# Installs the lint tools into a virtual environment, once for each set of pins: .ci/tools.sh DIR
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
stamp=$1/lint-tools.txt
cmp -s "$here/lint-tools.txt" "$stamp" && exit 0
echo "lint tools into $1"
"$1/bin/python" -m pip --disable-pip-version-check install -q -r "$here/lint-tools.txt" 2>&1 |
    grep -v "is ignored" || true
"$1/bin/ruff" --version >/dev/null # pip's failure would be hidden by the filter
cp "$here/lint-tools.txt" "$stamp"
