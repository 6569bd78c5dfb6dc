#!/usr/bin/env bash
# discover_tests.sh PROGRAM CATCH2_MAJOR LABEL OUTPUT [PREFIX]: writes the CTest list of a Catch2
# program; PREFIX goes before the names.
# Catch2 2's own script knows no labels and breaks at names with brackets or semicolons.
set -euo pipefail
program=$1 major=$2 label=$3 output=$4 prefix=${5-}

names() {  # the exit status of this listing is the number of tests in Catch2 2
  if ((major >= 3)); then
    "$program" "$@" --list-tests --verbosity quiet
  else
    "$program" "$@" --list-test-names-only || true
  fi
}

declare -A labels=()
for tag in golden slow threads; do
  while IFS= read -r name; do labels[$name]+=";$tag"; done < <(names "[$tag]")
done

count=0
{
  while IFS= read -r name; do
    [[ -n $name ]] || continue
    count=$((count + 1))
    pattern=${name//\\/\\\\}
    pattern=${pattern//,/\\,}
    pattern=${pattern//[/\\[}
    echo "add_test([==[$prefix$name]==] [==[$program]==] [==[$pattern]==] --warn NoAssertions)"
    echo "set_tests_properties([==[$prefix$name]==] PROPERTIES LABELS [==[$label${labels[$name]-}]==]"
    echo "  TIMEOUT 600 FAIL_REGULAR_EXPRESSION [==[No test cases matched]==]"
    echo '  SKIP_REGULAR_EXPRESSION "(^|\n)skipped: ")'
  done < <(names)
} >"$output.new"
if ((count == 0)); then
  echo "discover_tests.sh: $program holds no tests" >&2
  exit 1
fi
mv "$output.new" "$output"
