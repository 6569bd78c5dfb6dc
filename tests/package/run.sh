#!/usr/bin/env bash
# run.sh KIND BUILD_DIR: a program outside the project uses the library, in one of these ways:
# find_package after an install, add_subdirectory, or one compiler command without CMake.
set -euo pipefail
kind=$1 build=$2
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
setting() { sed -nE "s/^$1:[A-Z]+=//p" "$build/CMakeCache.txt"; }

with_cmake() {
  cmake -S "$here" -B "$work/build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
    -DCMAKE_CXX_COMPILER="$CXX" -DCMAKE_CXX_FLAGS="$(setting CMAKE_CXX_FLAGS)" "$@"
  cmake --build "$work/build" -j 2
  "$work/build/consumer"
  "$work/build/consumer_compiled"
}
with_compiler() {
  command -v "$CXX" >/dev/null || exit 77
  # shellcheck disable=SC2086
  "$CXX" -std=c++20 -O2 "$@" $SSMLIB_CHECK_FLAGS -pthread "$here/main.cpp" "$here/second.cpp" \
    -o "$work/consumer"
  "$work/consumer"
}

case $kind in
  find_package)
    cmake --install "$build" --prefix "$work/prefix" >/dev/null
    with_cmake -DCMAKE_PREFIX_PATH="$work/prefix"
    ;;
  add_subdirectory) with_cmake -DSSMLIB_SOURCE_DIR="$(cd "$here/../.." && pwd)" ;;
  plain) with_compiler ;;
  plain_avx2)
    grep -qw avx2 /proc/cpuinfo || exit 77
    with_compiler -mavx2 -mfma -mf16c
    ;;
  plain_clang) CXX=clang++ with_compiler -Wall -Wextra -Wpedantic -Werror ;;
  *)
    echo "run.sh: unknown kind $kind" >&2
    exit 2
    ;;
esac
