#!/usr/bin/env bash
# The paper's tables on real faces: synthesis, inversion, editing, conditional edits, for a W++ generator and its W baseline.
#
#   DATA=data OUT=runs/tables benchmarks/face_tables.sh synthesis inversion boundaries encoders editing conditional
#
# DATA holds faces-heldout/ and weights/; FACES is the LMDB that the generators were trained on. The W baseline is left out unless W
# names a generator; the tables of docs/results.md at 64 px are of the files in checkpoints/ at commit 85d3235: WPP, W, ENCODER and CGAN
# name them, SIZE=64. Projector, encoders and boundaries go on where they were stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PY:-.venv/bin/python}
DATA=${DATA:?set DATA to the folder that holds faces/ and faces-heldout/}
OUT=${OUT:-runs/tables}
FACES=${FACES:-runs/faces.lmdb}
SIZE=${SIZE:-128}
W=${W:-}
KINDS=${KINDS:-${W:+w }wpp}
WPP=${WPP:-checkpoints/face-wpp-$SIZE.safetensors}
ENCODER=${ENCODER:-checkpoints/face-psp-$SIZE.safetensors}
CGAN=${CGAN:-checkpoints/face-cgan-$SIZE.safetensors}
NET=${NET:-squeeze}     # LPIPS backbone and features
STEPS=${STEPS:-200}     # of the projector
LR_W=${LR_W:-0.28}      # step sizes per space: docs/results.md
LR_WPP=${LR_WPP:-0.5}
LR_ENCODER=${LR_ENCODER:-0.2}
COUNT=${COUNT:-200}     # held-out faces of the inversions
PROCESSES=${PROCESSES:-2}  # of the training of encoders
export WPP_WEIGHTS=${WPP_WEIGHTS:-$DATA/weights}
mkdir -p "$OUT"

has() { [[ " $KINDS " == *" $1 "* ]]; }
ckpt() { if [ "$1" = w ]; then echo "$W"; else echo "$WPP"; fi; }

faces() {  # faces N K: every K-th held-out face in sorted order, N of them
  local folder=$OUT/faces$1
  if [ ! -d "$folder" ]; then
    mkdir "$folder"
    ls "$DATA/faces-heldout" | grep 'jpg$' | awk -v k="$2" 'NR % k == 1' | head -n "$1" |
      while read -r name; do cp "$DATA/faces-heldout/$name" "$folder/"; done
  fi
}

synthesis() {  # 10,000 real and 10,000 drawn faces
  local kind extractor script common
  for kind in $KINDS; do
    for extractor in $NET scorer; do
      common="--real $FACES --size $SIZE --fake $(ckpt "$kind") --extractor $extractor --n_sample 10000 --noise none --device cpu"
      for script in fid prdc; do $PY metrics/$script.py $common --output "$OUT/synthesis-$extractor.jsonl"; done
    done
  done
}

inversion() {  # held-out faces in W, W+, W++, W++ from the encoder, and by the encoder alone
  faces "$COUNT" 11
  local common="--dataset $OUT/faces$COUNT --step $STEPS --mse 1 --noise 0 --perceptual $NET --device cpu"
  local folders=()
  if has w; then
    $PY projector.py --ckpt "$W" --space w --lr "$LR_W" $common --output_dir "$OUT/inverted-w"
    $PY projector.py --ckpt "$W" --space w+ --lr "$LR_W" $common --output_dir "$OUT/inverted-wplus"
    folders+=("$OUT"/inverted-{w,wplus})
  fi
  if has wpp; then
    $PY projector.py --ckpt "$WPP" --init "encoder:$ENCODER" --lr "$LR_ENCODER" $common --output_dir "$OUT/inverted-encoder"
    $PY projector.py --ckpt "$WPP" --lr "$LR_WPP" $common --output_dir "$OUT/inverted-wpp"
    $PY pSp/scripts/inference.py --exp_dir "$OUT/psp" --checkpoint_path "$ENCODER" --data_path "$OUT/faces$COUNT" --lpips_net $NET --retrieval "$COUNT" --device cpu
    folders+=("$OUT/inverted-wpp" "refined=$OUT/inverted-encoder" "$OUT/psp")
  fi
  $PY metrics/reconstruction.py "${folders[@]}" --measures perceptual,mse,identity --output "$OUT/reconstruction.txt"
}

encoders() {  # pSp into W+ and W of the twin, trained as face-psp-64 was (a GradualStyleEncoder), and the same faces by each
  faces "$COUNT" 11
  local space flags common="--stylegan_weights $W --train_path $FACES --holdout 0.05 --val_images 256 --encoder_width 16 --batch_size 16 --test_batch_size 32"
  common+=" --workers 0 --test_workers 0 --start_from_latent_avg --lpips_lambda 0.8 --lpips_net $NET --l2_lambda 1 --id_lambda 0 --precision bf16"
  common+=" --val_interval 250 --save_interval 250 --threads 1 --device cpu --resume auto"
  for space in wplus w; do
    flags="--exp_dir $OUT/encoder-$space $common"
    if [ $space = w ]; then flags+=" --learn_in_w"; fi
    $PY -m torch.distributed.run --nproc_per_node "$PROCESSES" pSp/scripts/train.py $flags --learning_rate 0.001 --max_steps 1500
    $PY -m torch.distributed.run --nproc_per_node "$PROCESSES" pSp/scripts/train.py $flags --learning_rate 0.0002 --max_steps 1850
    $PY pSp/scripts/inference.py --exp_dir "$OUT/psp-$space" --checkpoint_path "$OUT/encoder-$space/checkpoints/best_model.pt" \
      --data_path "$OUT/faces$COUNT" --lpips_net $NET --retrieval "$COUNT" --device cpu
  done
  $PY metrics/reconstruction.py "$OUT"/psp-{w,wplus} --measures perceptual,mse,identity --output "$OUT/encoders.txt"
}

boundaries() {  # 20,000 samples of each generator
  local kind attribute
  for kind in $KINDS; do
    for attribute in age gender smile; do
      [ -f "$OUT/$kind-$attribute/boundary-$attribute.npz" ] || $PY edit_attribute.py --ckpt "$(ckpt "$kind")" --attribute $attribute --num_sample 20000 \
        --noise none --fit ridge --samples "$OUT/$kind-samples" --latent "$OUT/inverted-$kind" --at 2 --distance relative --unit std \
        --identity none --perceptual none --output_dir "$OUT/$kind-$attribute" --device cpu
    done
  done
}

editing() {  # the first 60 of these faces, -6 to 6 standard deviations
  local attribute ckpts=() latents=() names=() kinds=()
  if has w; then ckpts+=("$W" "$W") latents+=("$OUT"/inverted-{w,wplus}) names+=(W W+) kinds+=(w w); fi
  if has wpp; then ckpts+=("$WPP" "$WPP") latents+=("$OUT"/inverted-{wpp,encoder}) names+=(W++ W++enc) kinds+=(wpp wpp); fi
  for attribute in age gender smile; do
    $PY metrics/editing.py --ckpt "${ckpts[@]}" --latent "${latents[@]}" --boundary $(printf "$OUT/%s-$attribute/boundary-$attribute.npz " "${kinds[@]}") \
      --names "${names[@]}" --reach 6 --steps 9 --faces 60 --perceptual $NET --device cpu --output_dir "$OUT/editing-$attribute"
  done
}

conditional() {  # 40 of them asked to smile, and not to, by the conditional generator
  faces 40 57
  local common="--ckpt $CGAN --perceptual $NET --eval_scorer face-scorer-eval --device cpu --start inversion"
  $PY edit_conditional.py $common --source "$OUT/faces40" --set smile=1 --step 100 --lr 0.2 --mse 1 --noise 0 --output_dir "$OUT/cast"
  $PY edit_conditional.py $common --source "$OUT/cast/inverted" --set smile=0 --output_dir "$OUT/cast-sober"
}

for part in "$@"; do "$part"; done
