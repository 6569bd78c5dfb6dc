#!/usr/bin/env bash
# demo.sh PROGRAM: what the demo promises on the command line, on a tiny run: one sentence and exit
# code 2 for what cannot be used, stopping and going on to the same bytes, and the files it leaves.
set -euo pipefail
program=$(realpath "$1")
work=$(mktemp -d)
pid=
cleanup() {
  [[ -z $pid ]] || kill -KILL "$pid" 2>/dev/null || true
  rm -rf "$work"
}
trap cleanup EXIT
cd "$work"

fail() {
  echo "demo.sh: $1" >&2
  [[ ! -s errors ]] || tail -n 5 errors >&2
  exit 1
}

prose() {  # prose SEED: 100,000 bytes of random words in lines
  awk -v seed="$1" 'BEGIN {
    srand(seed)
    for (bytes = 0; bytes < 100000; bytes += length(line) + 1) {
      line = ""
      for (w = 0; w < 12; ++w) {
        for (n = 2 + int(8 * rand()); n > 0; --n) line = line substr("etaoinshrdlucmfw", 1 + int(16 * rand()), 1)
        line = line " "
      }
      print line
    }
  }'
}
prose 1 >text
small=(--teacher '*-*-' --student 'M-M-' --hybrid 'M-*-' --draft M- --width 16 --heads 2
  --held-out-bytes 2048 --threads 2 --budget 0.05)
tiny=("${small[@]}" --new-tokens 33 --text text)

# ---- what cannot be used ------------------------------------------------------------------------
refused() {  # refused PATTERN ARGUMENTS...: exit code 2 and one sentence that matches PATTERN
  local pattern=$1 code=0
  shift
  timeout -k 1 60 "$program" "$@" >output 2>errors || code=$?
  ((code == 2)) || fail "$*: exit code $code, wanted 2"
  [[ ! -s output ]] || fail "$*: an error wrote to the standard output"
  [[ $(wc -l <errors) == 1 ]] || fail "$*: $(wc -l <errors) lines instead of one sentence"
  (($(wc -c <errors) < 250)) || fail "$*: a sentence of $(wc -c <errors) bytes"
  grep -q "^distill: .*$pattern" errors || fail "$*: the message does not say '$pattern'"
}
head -c 100000 /dev/urandom >binary
head -c 1000 text >short
refused "has 'X' at place 1" "${tiny[@]}" --teacher '*X'
refused 'pattern is empty' "${tiny[@]}" --student ''
refused 'replaces no mixer' "${tiny[@]}" --hybrid '*-*-'
refused "'missing' does not exist" "${small[@]}" --text missing
refused 'is a folder' "${small[@]}" --text .
refused "'binary' is not plain text" "${small[@]}" --text binary
refused 'the text is 1000 bytes, at least 65536' "${small[@]}" --text short
refused "'text/out' cannot be created" "${tiny[@]}" --out text/out
refused "'/proc' cannot be written" "${tiny[@]}" --out /proc
refused 'does not fit the heads' "${tiny[@]}" --width 18
for bad in '--budget 0' '--budget -1' '--budget nan' '--budget inf' '--budget 1e300' '--budget x' \
  '--threads -3' '--threads 1.5' '--heads 0' '--width 99999999' '--max-bytes -5' '--max-bytes 9' \
  '--held-out-bytes 1' '--new-tokens 0' '--seed -1'; do
  read -r option value <<<"$bad"
  refused "$option: wanted a number from .*, not '$value'" "${tiny[@]}" "$option" "$value"
done
refused 'not expected: --nonsense' "${tiny[@]}" --nonsense
refused '--device: tpu not in' "${tiny[@]}" --device tpu
refused 'was built without CUDA' "${tiny[@]}" --device cuda
refused '--budget.*required' --budget

"$program" --help >output 2>errors || fail '--help failed'
for word in --device --text --resume --budget --held-out-bytes Ctrl-C 'Exit codes'; do
  grep -q -e "$word" output || fail "--help does not mention $word"
done
[[ ! -s errors ]] || fail '--help wrote to the error stream'
"$program" --version >output || fail '--version failed'
version=$(sed -nE 's/^ssmlib ([0-9.]+) \(commit (.+)\)$/\1 \2/p' output)
[[ -n $version ]] || fail "--version says $(cat output)"

# ---- a whole run --------------------------------------------------------------------------------
"$program" "${tiny[@]}" --out whole >output 2>errors || fail "a tiny run failed"
grep -q 'greedy text equal to plain: yes' output || fail "no table of results"
keys=(teacher_bpb ngram_bpb student_bpb student_bpb_stages_2_3 student_bpb_stage3_only hybrid_bpb
  hybrid_bpb_stage3_only tokens_per_step speculative_speedup seconds)
for key in "${keys[@]}"; do
  grep -qE "^  \"$key\": [0-9]+(\.[0-9]+)?(e-?[0-9]+)?,?$" whole/summary.json ||
    fail "summary.json has no number '$key'"
done
grep -q '^  "greedy_speculative_equals_plain": true' whole/summary.json ||
  fail 'the greedy texts differ, or summary.json does not say'
grep -q '^  "device": "cpu"' whole/summary.json || fail 'summary.json does not say which device'
grep -qE '^  "date": "[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}Z"' whole/summary.json ||
  fail 'summary.json has no date'
grep -qF "\"version\": \"${version% *}\"" whole/summary.json || fail 'summary.json: no version'
grep -qF "\"commit\": \"${version#* }\"" whole/summary.json || fail 'summary.json: no commit'
grep -qF "ssmlib ${version% *} (commit ${version#* })" whole/report.html ||
  fail 'report.html does not say what it was built from'
links=$(grep -oiE "(src|href|action|data)=[\"'][^\"']{0,20}|url\([^)]{0,20}|@import|<(script|link|iframe)" \
  whole/report.html | grep -viE "^src=\"data:|^href=['\"]#|^url\(['\"]?#" || true)
[[ -z $links ]] || fail "report.html refers to something outside: $links"
(($(grep -o 'src="data:image/png' whole/report.html | wc -l) >= 12)) || fail 'pictures are missing'
models=(draft hybrid hybrid-stage-3 student student-stage-3 student-stages-2-3 teacher)
for m in "${models[@]}"; do
  [[ -s whole/models/$m.safetensors ]] || fail "models/$m.safetensors is missing"
done

# ---- Ctrl-C and --resume ------------------------------------------------------------------------
interrupt() {  # interrupt PATTERN ARGUMENTS...: Ctrl-C once the error stream matches PATTERN
  local pattern=$1 code=0
  shift
  : >errors  # what an earlier run has written must not match
  "$program" "$@" >output 2>errors &
  pid=$!
  until grep -q "$pattern" errors; do
    kill -0 "$pid" 2>/dev/null || fail "$*: ended before '$pattern'"
    sleep 0.02
  done
  kill -INT "$pid"
  wait "$pid" || code=$?
  pid=
  ((code == 130)) || fail "Ctrl-C at '$pattern': exit code $code, wanted 130"
  grep -q 'resume goes on' errors || fail "Ctrl-C at '$pattern': not said how to go on"
  [[ ! -e $stopped/summary.json ]] || fail "Ctrl-C at '$pattern': a stopped run has results"
}
same_models() {
  local m
  for m in "${models[@]}"; do
    cmp "whole/models/$m.safetensors" "$1/models/$m.safetensors" || fail "$2: other weights"
  done
}
stopped=stopped
interrupt '^== teacher' "${tiny[@]}" --out stopped
[[ -e stopped/stages/teacher.checkpoint ]] || fail 'Ctrl-C in the teacher left no checkpoint'
interrupt '^== hybrid, stage 2' "${tiny[@]}" --out stopped --resume
[[ -e stopped/stages/student-3.done ]] || fail 'Ctrl-C in the hybrid lost the student'
# 20,000 bytes of text take far longer than a signal: the run must not wait for them.
interrupt '^draft_bpb' "${small[@]}" --text text --new-tokens 20000 --out stopped --resume
"$program" "${tiny[@]}" --out stopped --resume >output 2>errors || fail '--resume failed'
! grep -q '^== .*steps' errors || fail '--resume trained again what was done'
same_models stopped 'stopped and resumed'

# ---- --resume of another run --------------------------------------------------------------------
tr e o <text >other
refused 'is of a run with other text or options' "${small[@]}" --text other --out whole --resume
refused 'is of a run with other text or options' "${tiny[@]}" --seed 7 --out whole --resume
same_models whole 'refused'
echo "all as promised"
