#!/usr/bin/env bash
# The families that headers instantiate, and the *_impl.hpp with SSMLIB_INLINE, are the rows of
# cmake/compiled.cmake, each in its header.
set -euo pipefail
cd "$(dirname "$0")/../.."

listed=$(sed -n '/^set(ssmlib_families/,/)/p' cmake/compiled.cmake | grep -oE '[a-z0-9_]+=[^ )]+' | sort)
used=$({
  grep -rl --include='*.hpp' --exclude=compiled.hpp SSMLIB_INSTANTIATE include | while read -r header; do
    tr -d ' \\\n' <"$header" | grep -oE 'SSMLIB_INSTANTIATE\([a-z0-9_]+' |
      sed "s,SSMLIB_INSTANTIATE(\(.*\),\1=${header#include/},"
  done
  grep -rlw --include='*_impl.hpp' --exclude='cuda_*' --exclude-dir=cuda SSMLIB_INLINE include |
    sed -E 's,^include/(.*/([a-z0-9_]+)_impl\.hpp)$,\2=\1,'
} | sort -u)
echo "$used"
diff <(echo "$listed") <(echo "$used") >&2 || {
  echo "< in cmake/compiled.cmake, > in the headers: both must name the same families" >&2
  exit 1
}
