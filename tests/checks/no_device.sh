#!/usr/bin/env bash
# no_device.sh PROGRAM...: each says in one sentence that there is no CUDA device, and exits with 2.
# Machines that have one hide it.
set -uo pipefail
failures=0
for program in "$@"; do
  output=$(CUDA_VISIBLE_DEVICES=-1 "$program" 2>&1 </dev/null)
  status=$?
  if [[ $status -ne 2 || $(wc -l <<<"$output") -ne 1 || $output != *"CUDA device"* ]]; then
    echo "no_device.sh: $program exits with $status and says: $output" >&2
    failures=$((failures + 1))
  fi
done
exit $((failures > 0))
