"""What was done at the demo page as files and as commands of the scripts that give the same result.

print(command_lines(tools, face, edit))
paths = save_results(tools, face, edit, view, folder)       # picture, photo, zip of latents and commands
"""

from __future__ import annotations

import os
import shlex
import zipfile
from dataclasses import asdict
from pathlib import Path

from common.images import save_image
from common.latents import save_latents
from common.runs import write_json
from editing.refinement import refine_settings
from editing.session import (
    MEAN_SAMPLES,
    TRUNCATION,
    Edit,
    Face,
    Tools,
    View,
    face_to_paste,
    moving_layers,
    paste,
)
from faces.folder import VERSION, AlignSettings


def command_lines(tools: Tools, face: Face, edit: Edit, paste_mode: str = "change") -> str:
    """A few lines of shell for the folder that the page was started from, with the photo and the unpacked zip in it.

    paste_mode change: what is pasted is to_paste/ of the zip, since only the page computes it. Results land in out/.
    """
    generator = ["--ckpt", shown(tools.ckpt)]
    lines, edited = [], edit.moving()
    if face.method == "drawn":
        lines.append(["python", "generate.py", *generator, "--seeds", face.seed, "--truncation", TRUNCATION,
                      "--truncation_mean", MEAN_SAMPLES, "--noise", "none", "--output_dir", "out/faces",
                      "--save_latents", "out/inverted"])  # fmt: skip
    else:
        by_hand = ["--landmarks", "landmarks.json"] if face.landmarks else []
        lines.append(["python", "align_faces.py", "--photos", face.source, "--output_dir", "out/faces", *by_hand])
        lines.append(_inversion(tools, face, generator))
    if edited:
        layers = moving_layers(tools, edit)
        files = [shown(tools.boundaries[name][0]) for name in edited]
        lines.append(["python", "edit_attribute.py", *generator, "--latent", "out/inverted", "--output_dir",
                      "out/edited", "--boundary", *files, "--at", *(f"{value:g}" for value in edited.values()),
                      "--distance", "relative", "--unit", "std",
                      *(["--layers", f"{layers[0]}-{layers[-1]}"] if layers else []),
                      "--attribute", next(iter(edited)),
                      *(["--scorer", tools.scorer_name] if tools.scorer_name != "face-scorer" else [])])  # fmt: skip
    text = [shlex.join(str(word) for word in line) for line in lines]
    if edited and face.source:
        folder = "to_paste"  # of the zip
        if paste_mode == "face":
            folder, picture = "out/to_paste", shlex.quote(f"out/to_paste/{face.alignment.name}.png")
            text.append(f"mkdir -p out/to_paste && cp out/edited/frames/*.png {picture}")
        text.append(shlex.join(["python", "align_faces.py", "--paste_back", folder, "--alignment",
                                "out/faces/alignment.json", "--photos", face.source, "--output_dir", "out/pasted",
                                *(["--detail", "keep"] if paste_mode == "change" else [])]))  # fmt: skip
    return "\n".join(text)


def _inversion(tools: Tools, face: Face, generator: list) -> list:
    encoder = shown(tools.encoder_path) if tools.encoder_path else None
    if face.method == "encoder":
        return ["python", "pSp/scripts/inference.py", "--checkpoint_path", encoder, "--stylegan_weights", generator[1],
                "--data_path", "out/faces/aligned", "--exp_dir", "out/inverted",
                *(["--lpips_net", tools.perceptual_name] if tools.perceptual_name != "auto" else [])]  # fmt: skip
    settings = refine_settings(tools, max(1, face.steps))
    return ["python", "projector.py", *generator, "--dataset", "out/faces/aligned", "--output_dir", "out/inverted",
            *(["--init", f"encoder:{encoder}"] if encoder else []), "--step", settings.steps, "--lr",
            f"{settings.lr:g}", "--mse", f"{settings.mse:g}", "--noise", f"{settings.noise:g}", "--mean_samples",
            MEAN_SAMPLES, *(["--space", tools.space] if tools.space != "w++" else []),
            *(["--perceptual", tools.perceptual_name] if tools.perceptual_name != "auto" else [])]  # fmt: skip


def shown(path: Path) -> str:
    """A path as the user would type it: relative where it lies below the working folder."""
    path = Path(path)
    return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else os.fspath(path)


def save_results(tools: Tools, face: Face, edit: Edit, view: View, folder, paste_mode: str = "change") -> list[Path]:
    """Picture (.png), photo (a JPEG stays one; none for a drawn face) and a zip, in `folder`; returns their paths.

    The zip holds inverted/ and edited/ (latents with their noise, for generate.py --latents), commands.txt, and of a
    photo to_paste/NAME.png, alignment.json and, where they were given, landmarks.json.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [save_image(view.edited, folder / f"{face.name}-edited.png")]
    parts = folder / "parts"
    if face.source:
        suffix = ".jpg" if Path(face.source).suffix.lower() in (".jpg", ".jpeg", ".jfif") else ".png"
        paths.append(save_image(paste(face, view, paste_mode), folder / f"{face.name}-photo{suffix}"))
        save_image(
            face_to_paste(face.photo, face.alignment, view, paste_mode),
            parts / "to_paste" / f"{face.alignment.name}.png",
        )
        write_json(parts / "alignment.json", {"version": VERSION, "settings": asdict(AlignSettings()),
                                              "faces": [face.alignment.to_dict()], "photos": []})  # fmt: skip
    if face.landmarks:
        write_json(parts / "landmarks.json", {face.source: face.landmarks})
    described = {
        "names": [f"{face.alignment.name}.png"], "size": tools.size,
        "fingerprint": tools.generator.fingerprint, "alignment": [face.alignment.to_dict()], "noise": face.noise,
    }  # fmt: skip
    about = {"method": face.method, "steps": face.steps, "seed": face.seed}
    save_latents(parts / "inverted", face.code[None], space=space_of(tools, face.code), **described, extra=about)
    save_latents(parts / "edited", view.code[None], space=space_of(tools, view.code), **described,
                 extra=about | {"edit": asdict(edit)})  # fmt: skip
    (parts / "commands.txt").write_text(command_lines(tools, face, edit, paste_mode) + "\n", encoding="utf-8")
    archive = folder / f"{face.name}-latents.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(parts.rglob("*")):
            if path.is_file():
                file.write(path, path.relative_to(parts).as_posix())
    return [*paths, archive]


def space_of(tools: Tools, code) -> str:
    """w++; of a W generator w, or w+ where the layers differ."""
    if not tools.generator.config.w_space:
        return "w++"
    return "w" if (code == code[:1]).all() else "w+"
