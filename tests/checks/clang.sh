#!/usr/bin/env bash
# clang.sh FILE FLAGS: clang++ compiles the test without warnings. Code is generated (at -O0) and
# thrown away, since a missing instruction set shows only then.
set -euo pipefail
command -v clang++ >/dev/null || exit 77
object=$(mktemp)
trap 'rm -f "$object"' EXIT
# shellcheck disable=SC2086
clang++ -std=c++20 -march=native -O0 -Wall -Wextra -Wpedantic -Werror $2 -c "$1" -o "$object"
