#!/usr/bin/env bash
# fail.sh FILE: the file must not compile, and the first error that the compiler reports must hold
# the text of the file's line `// expected-error {{text}}`.
set -euo pipefail
command -v "$CXX" >/dev/null || exit 77
expected=$(sed -nE 's,.*// expected-error \{\{(.*)\}\}.*,\1,p' "$1")
if [[ $(wc -l <<<"$expected") != 1 || -z $expected ]]; then
  echo "$1: wanted one line // expected-error {{text}}" >&2
  exit 1
fi
# shellcheck disable=SC2086
if output=$("$CXX" -std=c++20 $SSMLIB_CHECK_FLAGS -fsyntax-only "$1" 2>&1); then
  echo "$1 compiles, but should not" >&2
  exit 1
fi
first=$(grep -m 1 'error: ' <<<"$output") || true
if [[ $first != *"$expected"* ]]; then
  printf 'the first error is not {{%s}}:\n%s\n' "$expected" "$(head -60 <<<"$output")" >&2
  exit 1
fi
echo "first of $(wc -l <<<"$output") lines: $first"
