#!/usr/bin/env bash
# Every benchmark of docs/performance.md on this machine, one after another, with nothing else running: estimated at 20 minutes on
# two cores. Tables go to OUT/NAME.md (default: runs/benchmarks) as docs/performance.md has them, and all of them to OUT/all.md.
#
#   make bench                          benchmarks/all.sh [OUT [NAME ...]]
#   SMALL=1 benchmarks/all.sh           smoke sizes: shows that everything runs, its figures mean nothing
#   DTYPE=float32 benchmarks/all.sh     in another dtype than `auto` takes
#   PYTHON=... THREADS=... MIDBLOCK_DATA=...
set -u
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-runs/benchmarks}
[ $# -gt 0 ] && shift
python=${PYTHON:-$here/../.venv/bin/python}
machine=(--dtype "${DTYPE:-auto}")
[ -n "${THREADS:-}" ] && machine+=(--threads "$THREADS")
mkdir -p "$out"

if [ -n "${SMALL:-}" ]; then
  profile=(--samples 4 --token-samples 2 --tokens 32 --repeats 1)
  tune=(--rows 4 --batch 2 --max-length 128 --masks 01100)
  swap=(--samples 2 --tokens 32 --repeats 1)
  lens=(--samples 2 --tokens 32 --repeats 1)
  sweep=(--rows 8 --items 4 --epochs 1)
  weights=(--gigabytes 0.1 --rounds 1)
  estimates=(--samples 8)
  study=(--samples 6 --token-samples 4 --gradient-samples 4 --tokens 32)
else
  profile=(--samples 64 --token-samples 32 --repeats 1)
  tune=(--rows 24)
  swap=(--samples 16 --repeats 1)
  lens=(--samples 8 --repeats 1)
  sweep=(--rows 16 --items 8)
  weights=(--gigabytes 1 --rounds 2)
  estimates=(--samples 48)
  study=(--samples 48 --token-samples 16)
fi

failed=0
for name in "${@:-profile lens swap tune sweep weights estimates study own_trainer}"; do
  for one in $name; do
    case $one in
      profile) words=("${profile[@]}" "${machine[@]}") ;;
      lens) words=("${lens[@]}" "${machine[@]}") ;;
      swap) words=("${swap[@]}" "${machine[@]}") ;;
      tune) words=("${tune[@]}" "${machine[@]}") ;;
      sweep) words=("${sweep[@]}" "${machine[@]}") ;;
      weights) words=("${weights[@]}") ;;
      estimates) words=("${estimates[@]}" "${machine[@]}") ;;
      own_trainer) words=("${machine[@]}") ; [ -n "${SMALL:-}" ] && words=(--rows 4 --batch 2 --epochs 2 "${machine[@]}") ;;
      study) words=("${study[@]}" "${machine[@]}") ;;
      *) echo "no benchmark $one" >&2; exit 2 ;;
    esac
    begun=$(date +%s)
    echo "$one ${words[*]-}" >&2
    { echo "## $one"; echo; echo "\`python benchmarks/$one.py ${words[*]-}\`"; echo
      "$python" -W ignore "$here/$one.py" ${words[@]+"${words[@]}"} 2>"$out/$one.log"; } >"$out/$one.md"
    code=$?
    # 1 is a target that was missed (estimates) or a fault: the log says which
    [ $code -ne 0 ] && { failed=1; echo "$one: exit $code; the end of $out/$one.log:" >&2; tail -5 "$out/$one.log" >&2; }
    echo "  $(($(date +%s) - begun)) s" >&2
  done
done
rm -f "$out/all.md"
cat "$out"/*.md >"$out/all.tmp" && mv "$out/all.tmp" "$out/all.md"
exit $failed
