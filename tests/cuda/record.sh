#!/usr/bin/env bash
# record.sh FOLDER [COMMIT]: runs every GPU test that was built into FOLDER (build/default/tests) and
# prints the record that docs/results/ keeps: device, date, commit and each test with its verdict.
# KEEP_LOGS=FOLDER keeps what the tests print.
set -uo pipefail
folder=$(cd "${1:?usage: record.sh FOLDER [COMMIT]}" && pwd)
commit=${2:-$(git -C "$(dirname "${BASH_SOURCE[0]}")" rev-parse --short HEAD 2>/dev/null || echo unknown)}
logs=$(mktemp -d)
[[ -n ${KEEP_LOGS:-} ]] && logs=$KEEP_LOGS && mkdir -p "$logs" || trap 'rm -rf "$logs"' EXIT
verdict() { if (($1 == 0)); then echo passed; else echo "FAILED ($1)"; fi; }

began=$SECONDS
"$folder/test_cuda" -r xml > "$logs/test_cuda.xml"
status=$?
took=$((SECONDS - began))
if ((status == 2)); then
  cat "$logs/test_cuda.xml"
  exit 2
fi
# "verdict|name" of every test case.
awk -F'"' '/<TestCase /{name=$2} /<OverallResult .*success=/{print ($2 == "true" ? "passed" : "FAILED") "|" name}' \
  "$logs/test_cuda.xml" | sed 's/&lt;/</g;s/&gt;/>/g;s/&quot;/"/g;s/&amp;/\&/g' > "$logs/cases"
# Where a test ends the program, those that have not run say so.
"$folder/test_cuda" --list-test-names-only | grep -v '^$' | sort > "$logs/names"
cut -d'|' -f2- "$logs/cases" | sort | comm -13 - "$logs/names" | sed 's/^/FAILED (not run)|/' >> "$logs/cases"
: > "$logs/programs"
run() {  # run PROGRAM: "verdict|name|seconds"
  local before=$SECONDS status
  "$1" > "$logs/${1##*/}.txt" 2>&1
  status=$?
  echo "$(verdict $status)|cuda/${1##*/cuda_}|$((SECONDS - before))" >> "$logs/programs"
}
# Several at a time: their references run on the host. So times that they print here mean nothing.
for program in "$folder"/cuda_*; do
  [[ -x $program ]] || continue
  while (($(jobs -rp | wc -l) >= 6)); do wait -n; done
  run "$program" &
done
wait
sort -t'|' -k2 -o "$logs/programs" "$logs/programs"

cases=$(wc -l < "$logs/cases") programs=$(wc -l < "$logs/programs")
failed=$(grep -c '^FAILED' "$logs/cases" "$logs/programs" | awk -F: '{n += $2} END {print n}')
cat <<TEXT
# The CUDA backend's tests, $(date +%F)

| | |
|---|---|
| device | $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | sed 's/, /, driver /') |
| commit | $commit |
| command | \`tests/cuda/record.sh FOLDER\` |
| tests | $((cases + programs)): $cases of \`test_cuda\` ($took s) and $programs programs; $failed failed |

| program | verdict | seconds |
|---|---|---|
$(awk -F'|' '{print "| " $2 " | " $1 " | " $3 " |"}' "$logs/programs")

| test of \`test_cuda\` | verdict |
|---|---|
$(sort -t'|' -k2 "$logs/cases" | awk -F'|' '{print "| " $2 " | " $1 " |"}')
TEXT
((failed == 0))
