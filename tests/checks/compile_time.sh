#!/usr/bin/env bash
# compile_time.sh README.cpp LIBRARY FLAGS...: what including the library costs, in CPU seconds,
# against Eigen/Core and the standard headers that the library uses, timed in the same run.
set -euo pipefail
cd "$(dirname "$0")/../.."
example=$1 library=$2
shift 2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

{
  echo '#include <Eigen/Core>'
  grep -rhoE --include='*.hpp' '^#include <[a-z_]+>' include | sort -u
} >"$work/reference.cpp"
echo '#include <ssmlib/ssmlib.hpp>' >"$work/umbrella.cpp"

seconds() {  # seconds COMMAND...: user + system time of the fastest of three runs
  local TIMEFORMAT='%U %S' best= now
  for _ in 1 2 3; do
    now=$({ time "$@" >/dev/null 2>"$work/errors"; } 2>&1) || { cat "$work/errors" >&2; return 1; }
    now=$(awk '{print $1 + $2}' <<<"$now")
    best=$(awk -v a="$now" -v b="${best:-$now}" 'BEGIN {print a < b ? a : b}')
  done
  echo "$best"
}
failed=0
report() {  # report WHAT SECONDS LIMIT
  echo "$1: $2 CPU s, limit $3"
  awk -v a="$2" -v b="$3" 'BEGIN {exit !(a <= b)}' || failed=1
}

# shellcheck disable=SC2206
compile=("$CXX" -std=c++20 -O2 $SSMLIB_CHECK_FLAGS -pthread "$@")
reference=$(seconds "${compile[@]}" -c "$work/reference.cpp" -o "$work/a.o")
echo "Eigen/Core and the standard headers: $reference CPU s"
umbrella=$(seconds "${compile[@]}" -c "$work/umbrella.cpp" -o "$work/a.o")
report "ssmlib.hpp alone" "$umbrella" "$(awk -v r="$reference" 'BEGIN {print 2 * r}')"
whole=$(seconds "${compile[@]}" "$example" -o "$work/a.out")
report "the README example, header-only" "$whole" 15
compiled=$(seconds "${compile[@]}" -DSSMLIB_COMPILED "$example" "$library" -o "$work/a.out")
report "the README example with ssmlib::compiled" "$compiled" 5
exit $failed
