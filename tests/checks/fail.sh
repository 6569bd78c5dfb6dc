#!/usr/bin/env bash
# fail.sh FILE: the file must not compile, and the compiler must say each of its
# `// expected-error {{text}}` in a line of its own messages (not in an echo of the source).
set -euo pipefail
command -v "$CXX" >/dev/null || exit 77
mapfile -t expected < <(sed -nE 's,.*// expected-error \{\{(.*)\}\}.*,\1,p' "$1")
if ((${#expected[@]} == 0)); then
  echo "$1 holds no // expected-error {{text}}" >&2
  exit 1
fi
# shellcheck disable=SC2086
if output=$("$CXX" -std=c++20 $SSMLIB_CHECK_FLAGS -fsyntax-only "$1" 2>&1); then
  echo "$1 compiles, but should not" >&2
  exit 1
fi
messages=$(grep -E '(error|note): ' <<<"$output") || true
for text in "${expected[@]}"; do
  if ! grep -qF -- "$text" <<<"$messages"; then
    printf 'the compiler did not say {{%s}}; it said:\n%s\n' "$text" "$output" | head -60 >&2
    exit 1
  fi
done
echo "first of $(wc -l <<<"$output") lines: $(grep -m 1 'error: ' <<<"$output")"
