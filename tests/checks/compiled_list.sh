#!/usr/bin/env bash
# The families that headers instantiate, and the *_impl.hpp with SSMLIB_INLINE, are the rows of
# cmake/compiled.cmake, each in its header.
set -euo pipefail
cd "$(dirname "$0")/../.."

listed=$(sed -n '/^set(ssmlib_families/,/)/p' cmake/compiled.cmake | grep -oE '[a-z0-9_]+=[^ )]+' | sort)
used=$({
  grep -rnoE --include='*.hpp' '^ *SSMLIB_INSTANTIATE\([a-z0-9_]+' include |
    sed -E 's,^include/([^:]+):[0-9]+: *SSMLIB_INSTANTIATE\((.*),\2=\1,'
  grep -rlw --include='*_impl.hpp' SSMLIB_INLINE include |
    sed -E 's,^include/(.*/([a-z0-9_]+)_impl\.hpp)$,\2=\1,'
} | sort -u)
echo "$used"
diff <(echo "$listed") <(echo "$used") >&2 || {
  echo "< in cmake/compiled.cmake, > in the headers: both must name the same families" >&2
  exit 1
}
