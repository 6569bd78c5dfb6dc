#!/usr/bin/env bash
# run.sh KIND BUILD_DIR: a program outside the project uses the library, in one of these ways:
# find_package after an install, add_subdirectory, or one compiler command without CMake.
set -euo pipefail
kind=$1 build=$2
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
setting() { sed -nE "s/^$1:[A-Z]+=//p" "$build/CMakeCache.txt"; }

with_cmake() {  # with_cmake "PROGRAM..." OPTIONS...
  local programs=$1 program
  shift
  cmake -S "$here" -B "$work/build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
    -DCMAKE_CXX_COMPILER="$CXX" -DCMAKE_CXX_FLAGS="$(setting CMAKE_CXX_FLAGS)" "$@"
  # shellcheck disable=SC2086
  cmake --build "$work/build" -j 2 --target $programs
  for program in $programs; do "$work/build/$program"; done
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
    with_cmake "consumer consumer_compiled" -DCMAKE_PREFIX_PATH="$work/prefix"
    ;;
  # The compiled library would be built once more: find_package has linked the very same one.
  add_subdirectory) with_cmake consumer -DSSMLIB_SOURCE_DIR="$(cd "$here/../.." && pwd)" ;;
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
