#!/usr/bin/env bash
# mixed_flags.sh LIBRARY FLAGS...: ssmlib::compiled links with the flags it was built with, and with
# others gives an undefined symbol that names the page to read.
set -euo pipefail
library=$1
shift
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
printf '#include <ssmlib/base/compiled.hpp>\nint main() {}\n' >"$work/main.cpp"
# shellcheck disable=SC2206
compile=("$CXX" -std=c++20 -O2 $SSMLIB_CHECK_FLAGS -DSSMLIB_COMPILED "$@" "$work/main.cpp"
  "$library" -o "$work/main")
"${compile[@]}"
if "${compile[@]}" -DSSMLIB_BLAS 2>"$work/errors"; then
  echo "a program built with SSMLIB_BLAS links with a library built without" >&2
  exit 1
fi
grep 'ssmlib_mixed_build_flags__see_docs_build_md' "$work/errors"
