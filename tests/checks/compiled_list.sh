#!/usr/bin/env bash
# The families that headers instantiate are the rows of cmake/compiled.cmake, each in its header.
set -euo pipefail
cd "$(dirname "$0")/../.."
listed=$(sed -n '/^set(ssmlib_families/,/)/p' cmake/compiled.cmake | grep -oE '[a-z0-9_]+=[^ )]+' | sort -u) || true
used=$(grep -rnoE --include='*.hpp' '^ *SSMLIB_INSTANTIATE\([a-z0-9_]+' include |
  sed -E 's,^include/([^:]+):[0-9]+: *SSMLIB_INSTANTIATE\((.*),\2=\1,' | sort -u) || true
echo "$(grep -rE --include='*.hpp' '^ *SSMLIB_INSTANTIATE\(' include | wc -l) instantiations"
diff <(echo "$listed") <(echo "$used") >&2 || {
  echo "< in cmake/compiled.cmake, > in the headers: both must name the same families" >&2
  exit 1
}
