#!/usr/bin/env bash
# run.sh [PART OF A ROW'S NAME]: the CUDA benchmarks beside PyTorch's, in turn, on this machine's GPU.
# Builds what is missing; PROGRAM=path takes a program that is built already. Without torch it says so
# and prints ours alone. The registers, shared memory and spills of the kernels come last.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
program=${PROGRAM:-}
if [[ -z $program ]]; then
  cmake -S "$root" --preset default -DSSMLIB_BENCH=ON -DSSMLIB_CUDA=ON --log-level=NOTICE
  cmake --build "$root/build/default" --target ssmlib_cuda_bench
  program=$root/build/default/bench/ssmlib_cuda_bench
fi
rounds=${ROUNDS:-2}
for ((round = 1; round <= rounds; ++round)); do
  echo "== round $round of $rounds: ours"
  "$program" "$@"
  echo "== round $round of $rounds: PyTorch"
  if python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    python3 "$here/peers.py"
  else
    echo "run.sh: no torch with CUDA here; ours alone"
  fi
done
if command -v ncu >/dev/null; then
  echo "== kernels: threads a block, registers a thread, shared bytes, occupancy by the launch in %"
  ncu --section LaunchStats --section Occupancy --csv "$program" --once "$@" 2>/dev/null |
    python3 "$here/kernels.py" || echo "run.sh: ncu could not read this device"
fi
if command -v cuobjdump >/dev/null; then
  echo "== kernels that spill registers (bytes of local memory)"
  cuobjdump -res-usage "$program" 2>/dev/null |
    sed -nE '/Function/{s/.*Function ([^:]*):.*/\1/;h};/REG:/{s/.*REG:([0-9]+) STACK:([0-9]+) .*LOCAL:([0-9]+).*/\3 local, \2 stack, \1 registers/;G;s/\n/  /;p}' |
    c++filt | awk '$1 > 0 || $3 > 0' | sort -rn | cut -c1-160
fi
