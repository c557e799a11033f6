#!/usr/bin/env bash
# Makes the environment of one peer, or of the plot:
#
#     benchmarks/peers/make_venv.sh nixl|mooncake|lmcache|peercache|plot DIR SGLANG_VENV
#
# DIR is made new when its list of packages has changed; else this returns at once. Everything is pinned
# and installed without dependencies, since those name CUDA builds of several gigabytes. pip's output is
# in DIR/make_venv.log.
set -euo pipefail

[ $# -eq 3 ] || { echo "usage: $0 nixl|mooncake|lmcache|peercache|plot DIR SGLANG_VENV" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
name=$1
venv=$2
sglang=$(cd "$3" && pwd)
list=$here/$name.txt
options=(--no-deps)
[ "$name" = plot ] && list=$here/../requirements.txt options=()
[ -f "$list" ] || { echo "there is no $list" >&2; exit 2; }
stamp=$venv/make_venv.sha256
sum=$(cat "$here/make_venv.sh" "$list" | sha256sum)
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$sum" ] && exit 0

echo "environment of $name in $venv"
rm -rf "$venv"
mkdir -p "$venv"
log=$(cd "$venv" && pwd)/make_venv.log

quietly() {
    if ! "$@" >>"$log" 2>&1; then
        # pip reports each package source that it skips; the reason of a failure is elsewhere.
        grep -v "is ignored" "$log" | tail -n 10 >&2 || true
        echo "failed: $*; all of it is in $log" >&2
        exit 1
    fi
}

# Mooncake links against libibverbs also where there is no RDMA. Where the system has none, Debian's
# package is unpacked beside it, which needs no root; the harness puts it on the library path.
system_libraries() {
    ldconfig -p 2>/dev/null | grep -q 'libibverbs\.so\.1' && return
    command -v apt-get >/dev/null || {
        echo "libibverbs.so.1 is missing: install libibverbs (rdma-core)" >&2
        exit 1
    }
    echo "  libibverbs1 from Debian, unpacked into $venv/system"
    mkdir -p "$venv/system/packages"
    (cd "$venv/system/packages" && quietly apt-get download libibverbs1 libnl-3-200 libnl-route-3-200)
    for package in "$venv"/system/packages/*.deb; do quietly dpkg -x "$package" "$venv/system"; done
}

quietly "$sglang/bin/python" -m venv "$venv"
quietly "$venv/bin/python" -m pip --disable-pip-version-check install "${options[@]}" -r "$list"
case $name in
mooncake) system_libraries ;;
lmcache)
    site=$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')
    "$sglang/bin/python" -c 'import site; print(site.getsitepackages()[0])' >"$site/sglang.pth"
    ;;
esac
echo "$sum" >"$stamp"
