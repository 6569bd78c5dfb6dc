#!/usr/bin/env bash
# A header includes its own folder and lower layers only; the umbrellas stand above all folders.
# Eigen stays in kernels/ and in files named *_impl.hpp, the JSON library in io/. The umbrellas reach
# every header.
set -euo pipefail
cd "$(dirname "$0")/../../include/ssmlib"

declare -A rank=([base]=0 [backend]=1 [tensor]=2 [expr]=3 [kernels]=4 [lower]=5 [grad]=6 [nn]=7
  [mixer]=8 [model]=9 [train]=10 [distill]=10 [decode]=10 [eval]=10 [io]=11)
failures=0 count=0
fail() {
  echo "$1" >&2
  failures=$((failures + 1))
}

while IFS= read -r header; do
  header=${header#./}
  count=$((count + 1))
  folder=${header%%/*}
  [[ $header == */* ]] || folder=umbrella
  if [[ $folder != umbrella && -z ${rank[$folder]-} ]]; then
    fail "$header: the folder $folder/ is no layer; tests/checks/layers.sh lists them"
    continue
  fi
  grep -q '^#pragma once' "$header" || fail "$header: has no #pragma once"

  while IFS= read -r included; do
    case $included in
      '<ssmlib/'*) target=${included#<ssmlib/} target=${target%>} ;;
      '"'*)
        target=${included//\"/}
        target=$(realpath -m --relative-to=. "$(dirname "$header")/$target")
        ;;
      '<Eigen/'* | '<unsupported/Eigen/'*)
        [[ $folder == kernels || $header == *_impl.hpp ]] ||
          fail "$header: includes $included, which belongs in kernels/ or in an *_impl.hpp"
        continue
        ;;
      '<nlohmann/'*)
        [[ $folder == io ]] || fail "$header: includes $included, which belongs in io/"
        continue
        ;;
      *) continue ;;
    esac
    [[ -f $target ]] || fail "$header: includes $target, which does not exist"
    to=${target%%/*}
    if [[ $folder == umbrella ]]; then
      [[ $header != ssmlib.hpp || ( $to != io && $to != io.hpp ) ]] ||
        fail "$header: includes $target, but files and JSON are io.hpp"
    elif [[ $target != */* ]]; then
      [[ $target == fwd.hpp ]] || fail "$header: includes the umbrella $target"
    elif ((${rank[$to]-99} > ${rank[$folder]})); then
      fail "$header: includes $target, a higher layer (${folder}/ is layer ${rank[$folder]})"
    fi
  done < <(sed -nE 's/^[[:space:]]*#[[:space:]]*include[[:space:]]*([<"][^>"]*[>"]).*/\1/p' "$header")
done < <(find . -name '*.hpp' | sort)

# What the umbrellas do not include, nobody finds.
reached=$(printf '%s\n' cuda.hpp io.hpp ssmlib.hpp)
while :; do
  next=$({
    echo "$reached"
    xargs sed -nE 's/^[[:space:]]*#[[:space:]]*include[[:space:]]*<ssmlib\/([^>]*)>.*/\1/p' <<<"$reached"
  } | sort -u)
  [[ $next != "$reached" ]] || break
  reached=$next
done
while IFS= read -r header; do
  fail "$header: neither ssmlib.hpp nor io.hpp nor cuda.hpp includes it, directly or not"
done < <(comm -13 <(echo "$reached") <(find . -name '*.hpp' | cut -c3- | sort))

echo "$count headers, $failures failures"
((count > 0 && failures == 0))
