#!/usr/bin/env bash
# Every C++ file is as clang-format 14 writes it.
set -euo pipefail
cd "$(dirname "$0")/../.."
tool=$(command -v clang-format-14 || command -v clang-format) || exit 77
find include tests examples bench \( -name '*.[ch]pp' -o -name '*.cu' -o -name '*.cuh' \) -print0 |
  xargs -0 "$tool" --dry-run -Werror
