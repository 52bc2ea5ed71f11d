#!/usr/bin/env bash
# W, W++ and W++ without attention ("14 mapping" of the paper's figure of FID), trained alike, and their curves.
#
#   FACES=runs/faces.lmdb OUT=runs/ablation IMAGES=100000 benchmarks/ablation.sh wpp w independent
#
# Each name is one training (on one thread: start several side by side); with none, only the curve is drawn. Trainings go on where
# they were stopped. Features of SqueezeNet (weights in $WPP_WEIGHTS), unless EXTRACTOR names others.
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PY:-.venv/bin/python}
OUT=${OUT:-runs/ablation}
FACES=${FACES:-runs/faces.lmdb}
IMAGES=${IMAGES:-100000}
EXTRACTOR=${EXTRACTOR:-squeeze}
N_SAMPLE=${N_SAMPLE:-5000}
mkdir -p "$OUT"

train() {  # KIND [FLAG]
  $PY train.py --path "$FACES" --size 32 --exp_name "$OUT/$1" --channel_max 64 --batch 16 --r1 0.1 --lr 0.003 --g_reg_every 8 --augment \
    --noise none --precision bf16 --iter $((IMAGES / 16)) --save_every 625 --sample_every 625 --n_sample 36 --keep 1 --log_every 125 \
    --workers 0 --threads 1 --device cpu --resume auto ${2:+"$2"}
  local script
  for script in fid prdc; do
    $PY metrics/$script.py --real "$FACES" --size 32 --fake "$OUT/$1/checkpoint" --extractor "$EXTRACTOR" --n_sample "$N_SAMPLE" --noise none \
      --device cpu --output "$OUT/$1.jsonl"
  done
}

for kind in "$@"; do
  case $kind in
    wpp) train wpp ;;
    w) train w --w_space ;;
    independent) train independent --independent ;;
    *) echo "error: $kind: expected wpp, w or independent" >&2; exit 2 ;;
  esac
done
curves=()
for pair in "W++=wpp" "W=w" "8 mappings=independent"; do
  if [ -f "$OUT/${pair#*=}.jsonl" ]; then curves+=("${pair%%=*}=$OUT/${pair#*=}.jsonl"); fi
done
$PY metrics/report.py "${curves[@]}" --png "$OUT/fid-curve.png" --curve_csv "$OUT/curve.csv"
