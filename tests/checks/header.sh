#!/usr/bin/env bash
# header.sh HEADER: the header compiles alone, and twice, without warnings; as users of
# ssmlib::compiled see it, without what the *_impl.hpp bring along.
set -euo pipefail
command -v "$CXX" >/dev/null || exit 77
# shellcheck disable=SC2086
printf '#include <%s>\n#include <%s>\n' "$1" "$1" |
  "$CXX" -std=c++20 -DSSMLIB_COMPILED -Wall -Wextra -Wpedantic -Werror $SSMLIB_CHECK_FLAGS -fsyntax-only -x c++ -
