"""Kill each long command at random moments, start it again, compare its results with an undisturbed run's, bit for bit.

Tiny networks on drawn images. A run is killed once or twice by SIGKILL or SIGTERM, each time continued by the same
command. All files must be equal but for times, options and TensorBoard: tensors of checkpoints, entries of an LMDB,
bytes of the rest (a signal may add a checkpoint: SIGTERM's, or one that was due to be removed). No temporary file, no
process and no traceback may be left.

    python benchmarks/kill.py --n 100 --seed 0
"""

import atexit
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WPP_CACHE": "out/cache"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lmdb  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from common.cli import ROOT, ArgumentParser, positive_int, run_script  # noqa: E402
from common.images import save_image  # noqa: E402
from common.tables import text_table  # noqa: E402
from model import Discriminator, Generator, GeneratorConfig  # noqa: E402

TINY = "--style_dim 16 --n_mlp 1 --channel_max 8 --batch 4 --n_sample 4 --augment --resume auto --log_every 1 --keep 0"
PSP = "--encoder_width 2 --batch_size 2 --lpips_lambda 0 --id_lambda 0 --start_from_latent_avg --resume auto --keep 0 "
PSP += "--image_interval 4 --workers 1 --test_workers 1 --val_interval 3 --save_interval 3 --board_interval 1"
SCORER = "--validation 0.3 --width 0.1 --input_size 32 --batch 4 --resume auto --log_every 1"
INVERT = "--perceptual scorer:face-scorer --identity none --mean_samples 50 --batch 2 --noise_regularize 1"
COMMANDS = {
    "train.py": f"--path faces --size 16 {TINY} --iter 10 --save_every 3 --sample_every 10 --exp_name out",
    "pSp/scripts/train.py": f"--stylegan_weights generator.pt --train_path faces {PSP} --max_steps 7 --exp_dir out",
    "train_scorer.py": f"--labels labels.csv --data faces {SCORER} --iter 20 --save_every 3 --out out",
    "projector.py": f"--ckpt generator.pt --dataset faces --step 5 {INVERT} --output_dir out",
    "prepare_data.py": "--size 8,64,256 --n_worker 2 --out out faces",
    "align_faces.py": "--photos photos --n_worker 1 --output_dir out",
    "edit_photos.py": "photos/0.jpg photos/1.jpg --age +20 --strength 0.5 --quality fast --output_dir out",
    "metrics/extract_features.py": "generator.pt --extractor scorer --n_sample 200 --batch 20 --out out/features.npz",
}
NOT_COMPARED = ("options", "opt.json", "events.out")
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)
LIMIT, GRACE = 300, 20  # seconds of a whole run; of what is left of one after its signal


def build_parser():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=positive_int, default=100, help="kills in all, shared by the commands")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments, the signals and their number per run")
    return parser


def make_inputs() -> None:
    """A generator with a discriminator, faces with labels, photos: in the current folder."""
    import skimage.data

    torch.manual_seed(0)
    config = GeneratorConfig(16, 16, 1, channel_max=8)
    networks = {"g_ema": Generator(config).state_dict(), "d": Discriminator(config).state_dict()}
    torch.save(networks | {"config": config.to_dict()}, "generator.pt")
    draw, photo = np.random.default_rng(0), skimage.data.astronaut()[:440, :440]
    for i in range(8):
        save_image(draw.integers(0, 256, (4, 4, 3), np.uint8).repeat(10, 0).repeat(10, 1), f"faces/{i}.png")
        save_image(photo[:, i:], f"photos/{i}.jpg")
    Path("labels.csv").write_text("file,smile,age\n" + "".join(f"{i}.png,{i % 2},{20 + 5 * i}\n" for i in range(8)))


def execute(name: str) -> None:
    """Run a command in this process, a session of its own; it prints into log.txt."""
    os.setsid()
    for descriptor in (1, 2):
        os.dup2(os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
    sys.argv, sys.path[0] = [str(ROOT / name), *COMMANDS[name].split()], str((ROOT / name).parent)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()


def run_command(name: str, number: int = 0, moment: float = LIMIT) -> int | None:
    """Exit status of a command that gets the signal `number` after `moment` seconds, unless it has ended by then.

    None when it, or a worker of it, does not end by itself.
    """
    process = multiprocessing.get_context("fork").Process(target=execute, args=(name,))
    process.start()
    process.join(moment)
    if number and process.exitcode is None:
        os.kill(process.pid, number)
        process.join(GRACE)
    with suppress(ProcessLookupError):
        for _ in range(GRACE * 50):
            os.killpg(process.pid, 0)
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        return None
    return process.exitcode


def content() -> dict[str, str]:
    """{file in out/: what must be equal, as a text}; the files of these runs are small."""
    found = {}
    for path in sorted(p for p in Path("out").rglob("*") if p.is_file() and not p.name.startswith(NOT_COMPARED)):
        value = path.read_bytes()
        if path.suffix == ".pt":
            value = torch.load(path, weights_only=True)
        elif path.name == "data.mdb":
            with lmdb.open(str(path.parent), lock=False) as store, store.begin() as entries:
                value = {key.decode(): entry for key, entry in entries.cursor()}
        elif path.suffix == ".jsonl":
            value = [json.loads(line) | {"time": 0} for line in value.splitlines() if b'"Speed"' not in line]
        found[str(path)] = json.dumps(value, default=lambda v: (v if type(v) is bytes else v.numpy().tobytes()).hex())
    return found


def run_case(name: str, seconds: float, expected: dict[str, str], numbers: list[int], draw) -> tuple[list[str], str]:
    """Give a command of so many seconds these signals, then let it end: (signals that met it, what went wrong)."""
    met = []
    for number in numbers:
        if (status := run_command(name, number, draw.uniform(0, seconds))) is None:
            return [*met, number.name], "it, or a worker of it, did not end"
        met += [number.name] if status else []
    if status := run_command(name):
        return met, f"started again it ended with status {status}"
    result, extra = content(), "out/checkpoint" if met else "nothing"
    differing = [file for file in expected if expected[file] != result.get(file)]
    differing += [file for file in result if file not in expected and not file.startswith(extra)]
    differing += ["a traceback was printed"] if "Traceback" in Path("log.txt").read_text() else []
    return met, f"{len(differing)} differ: {', '.join(differing[:4])}" if differing else ""


def main(args):
    import cv2, matplotlib.figure, scipy.stats, sklearn, torch._dynamo, torch.utils.tensorboard  # noqa - before the forks

    os.chdir(folder := tempfile.mkdtemp(prefix="kill-"))
    make_inputs()
    whole, cases, draw = {}, [], random.Random(args.seed)
    while sum(len(met) for _, met, _ in cases) < args.n:
        name = list(COMMANDS)[len(cases) % len(COMMANDS)]
        if name not in whole:
            start = time.monotonic()
            assert run_command(name) == 0, f"{name} fails without a kill: see {folder}/log.txt"
            whole[name] = time.monotonic() - start, content()
            shutil.rmtree("out")
        cases.append((name, *run_case(name, *whole[name], draw.choices(SIGNALS, k=draw.choice((1, 1, 2))), draw)))
        if cases[-1][2]:
            print(f"{name} after {' and '.join(cases[-1][1])}: {cases[-1][2]}", file=sys.stderr, flush=True)
            shutil.copytree(".", f"{folder}-case-{len(cases)}")
        shutil.rmtree("out")
        os.unlink("log.txt")
    rows = []
    for name in whole:
        met, problems = zip(*((met, problem) for other, met, problem in cases if other == name), strict=True)
        kills = [sum(met, []).count(signal_name) for signal_name in ("SIGKILL", "SIGTERM")]
        rows.append([name, whole[name][0], *kills, len(problems), problems.count("")])
    print(text_table(["command", "seconds", "SIGKILL", "SIGTERM", "runs", "equal"], rows))
    shutil.rmtree(folder)
    return any(problem for *_, problem in cases)


if __name__ == "__main__":
    run_script(main, build_parser())
