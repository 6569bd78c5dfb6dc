#!/usr/bin/env bash
# header.sh HEADER: the header compiles alone, and twice, without warnings.
set -euo pipefail
command -v "$CXX" >/dev/null || exit 77
# shellcheck disable=SC2086
printf '#include <%s>\n#include <%s>\n' "$1" "$1" |
  "$CXX" -std=c++20 -Wall -Wextra -Wpedantic -Werror $SSMLIB_CHECK_FLAGS -fsyntax-only -x c++ -
