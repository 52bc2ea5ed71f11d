"""Write JPEG images of low quality again without their blocks and ringing, which a generator learns to draw.

    python checkpoints/training-128/restore_jpeg.py IMAGES OUT --clean FOLDER ...

A small residual network (Zhang et al. 2017, arXiv 1608.03981) learns from the clean images, compressed with the
quantisation tables of the first of IMAGES. Its weights are kept beside this script, and used when they are there.
"""

import argparse
import io
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.checkpoint import load_safetensors, load_strictly, save_safetensors
from common.images import list_images, read_image, save_image, to_tensor

WEIGHTS = Path(__file__).with_name("restore-jpeg.safetensors")
WIDTH, DILATIONS = 48, (1, 2, 1, 2, 1)
STEPS, BATCH, RATE, SIDE = 1000, 8, 1.5e-3, 96  # of the training; pixels of its windows, on the grid of the blocks


def build() -> nn.Sequential:
    """Images [N, 3, H, W] in [-0.5, 0.5] -> what the compression took away."""
    layers: list[nn.Module] = [nn.Conv2d(3, WIDTH, 5, padding=2), nn.ReLU()]
    for dilation in DILATIONS:
        layers += [nn.Conv2d(WIDTH, WIDTH, 3, padding=dilation, dilation=dilation), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Conv2d(WIDTH, 3, 3, padding=1))
    for layer in network[::2]:
        nn.init.kaiming_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    nn.init.normal_(network[-1].weight, std=1e-3)
    return network


def compress(image: Image.Image, tables: dict) -> Image.Image:
    """The image after JPEG with these quantisation tables, colours at half the resolution."""
    file = io.BytesIO()
    image.save(file, "JPEG", qtables=tables, subsampling=2)
    return Image.open(file).convert("RGB")


def fit(clean: list[Path], tables: dict) -> nn.Sequential:
    """Train the network on clean images of one size."""
    torch.manual_seed(0)
    images = [read_image(file) for file in clean]
    compressed = [compress(image, tables) for image in images]
    pairs = [torch.stack([to_tensor(image) / 2 for image in group]) for group in (compressed, images)]
    network = build()
    adam = torch.optim.Adam(network.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, RATE, total_steps=STEPS)
    for _ in tqdm(range(STEPS), desc="training", unit="step", disable=None):
        chosen = torch.randint(len(images), (BATCH,))
        top, left = (8 * torch.randint((pairs[0].shape[-1] - SIDE) // 8 + 1, (2,))).tolist()
        bad, good = (batch[chosen, :, top : top + SIDE, left : left + SIDE] for batch in pairs)
        adam.zero_grad()
        F.l1_loss(bad + network(bad), good).backward()
        adam.step()
        schedule.step()
    return network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--clean", type=Path, nargs="+", required=True, help="folders of images to learn from")
    args = parser.parse_args()
    files = list_images(args.images)
    if not WEIGHTS.exists():
        network = fit(
            [file for folder in args.clean for file in list_images(folder)], Image.open(files[0]).quantization
        )
        save_safetensors(WEIGHTS, {name: tensor.half() for name, tensor in network.state_dict().items()}, {})
    network, (weights, _) = build(), load_safetensors(WEIGHTS)
    load_strictly(network, {name: tensor.float() for name, tensor in weights.items()}, WEIGHTS)
    args.out.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for file in tqdm(files, desc="restoring", unit="img", disable=None):
            image = to_tensor(read_image(file))[None] / 2
            save_image(2 * (image + network(image))[0], args.out / f"{file.stem}.png")


if __name__ == "__main__":
    main()
