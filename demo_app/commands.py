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
from demo_app.expression import Cast
from demo_app.refinement import refine_settings
from demo_app.session import MEAN_SAMPLES, TRUNCATION, Edit, Face, Tools, View, moving_layers, paste
from faces.folder import VERSION, AlignSettings
from sampling.render import CONDITION


def command_lines(tools: Tools, face: Face, edit: Edit, paste_mode: str = "change") -> str:
    """A few lines of shell for the folder that the page was started from, with the photo and the unpacked zip in it.

    paste_mode: see session.paste. Results land in out/.
    """
    generator = ["--ckpt", shown(tools.ckpt)]
    lines, edited = [_faces(face, generator)], edit.moving()
    if face.method == "drawn":
        lines[0] += ["--save_latents", "out/inverted"]
    else:
        lines.append(_inversion(tools, face, generator))
    if edited:
        layers = moving_layers(tools, edit)
        files = [shown(tools.boundaries[name][0]) for name in edited]
        lines.append(
            [
                "python",
                "edit_attribute.py",
                *generator,
                "--latent",
                "out/inverted",
                "--output_dir",
                "out/edited",
                "--boundary",
                *files,
                "--at",
                *(f"{value:g}" for value in edited.values()),
                "--distance",
                "relative",
                "--unit",
                "std",
                *(["--layers", f"{layers[0]}-{layers[-1]}"] if layers else []),
                "--attribute",
                next(iter(edited)),
                *_named("--scorer", tools.scorer_name, "face-scorer"),
            ]
        )
    text = [_shell(tools, line) for line in lines]
    if edited:
        text += _pasting(face, paste_mode, "out/edited")
    return "\n".join(text)


def cast_lines(tools: Tools, cast: Cast, paste_mode: str = "change") -> str:
    """The same for the expression of a reference: its photo lies in the folder as well."""
    face, conditional = cast.face, tools.conditional.tools
    settings = refine_settings(conditional, cast.steps)
    lines = [
        _faces(face, ["--ckpt", shown(tools.ckpt)]),
        [
            "python",
            "align_faces.py",
            "--photos",
            cast.reference.source,
            "--output_dir",
            "out/reference",
            *_by_hand(cast.reference),
        ],
        [
            "python",
            "edit_conditional.py",
            "--ckpt",
            shown(conditional.ckpt),
            "--source",
            "out/faces/aligned" if face.source else "out/faces",
            "--reference",
            "out/reference/aligned",
            "--output_dir",
            "out/cast",
            *_projection(tools, settings),
        ],
    ]
    text = [_shell(tools, line) for line in lines]
    return "\n".join(text + _pasting(face, paste_mode, "out/cast"))


def _shell(tools: Tools, line: list) -> str:
    """The words as a line; of scripts that load third-party weights with the page's own folder of them."""
    weights = ["--weights_dir", tools.weights_dir] if tools.weights_dir and line[1] != "generate.py" else []
    return shlex.join(str(word) for word in [*line, *weights])


def _named(flag: str, name: str, usual: str) -> list[str]:
    """[flag, name]; nothing for the script's own default, and where the page went without."""
    return [] if name in (usual, "none") else [flag, name]


def _faces(face: Face, generator: list) -> list:
    """The command that makes the aligned or drawn face."""
    if face.method == "drawn":
        return [
            "python",
            "generate.py",
            *generator,
            "--seeds",
            face.seed,
            "--truncation",
            TRUNCATION,
            "--truncation_mean",
            MEAN_SAMPLES,
            "--noise",
            "none",
            "--output_dir",
            "out/faces",
        ]
    return ["python", "align_faces.py", "--photos", face.source, "--output_dir", "out/faces", *_by_hand(face)]


def _by_hand(face: Face) -> list:
    return ["--landmarks", "landmarks.json"] if face.landmarks else []


def _pasting(face: Face, paste_mode: str, folder: str) -> list[str]:
    """The command that puts the face back, of the folder where an edit has its results; none for a drawn face."""
    if not face.source:
        return []
    before = ["--unedited", f"{folder}/unedited"] if paste_mode == "change" else []
    line = [
        "python",
        "align_faces.py",
        "--paste_back",
        f"{folder}/edited",
        *before,
        "--alignment",
        "out/faces/alignment.json",
        "--photos",
        face.source,
        "--output_dir",
        "out/pasted",
    ]
    return [shlex.join(line)]


def _projection(tools: Tools, settings) -> list:
    return [
        "--step",
        settings["steps"],
        "--lr",
        f"{settings['lr']:g}",
        "--mse",
        f"{settings['mse']:g}",
        "--noise",
        f"{settings['noise']:g}",
        "--mean_samples",
        MEAN_SAMPLES,
        *_named("--perceptual", tools.perceptual_name, "auto"),
    ]


def _inversion(tools: Tools, face: Face, generator: list) -> list:
    encoder = shown(tools.encoder_path) if tools.encoder_path else None
    if face.method == "encoder":
        return [
            "python",
            "pSp/scripts/inference.py",
            "--checkpoint_path",
            encoder,
            "--stylegan_weights",
            generator[1],
            "--data_path",
            "out/faces/aligned",
            "--exp_dir",
            "out/inverted",
            *_named("--lpips_net", tools.perceptual_name, "auto"),
        ]
    return [
        "python",
        "projector.py",
        *generator,
        "--dataset",
        "out/faces/aligned",
        "--output_dir",
        "out/inverted",
        *(["--init", f"encoder:{encoder}"] if encoder else []),
        *(["--space", tools.space] if tools.space != "w++" else []),
        *_projection(tools, refine_settings(tools, max(1, face.steps))),
    ]


def shown(path: Path) -> str:
    """A path as the user would type it: relative where it lies below the working folder."""
    path = Path(path)
    return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else os.fspath(path)


def save_results(tools: Tools, face: Face, edit: Edit, view: View, folder, paste_mode: str = "change") -> list[Path]:
    """Picture (.png), photo (a JPEG stays one; none for a drawn face) and a zip, in `folder`; returns their paths.

    The zip holds inverted/ and edited/ (latents with their noise, for generate.py --latents), commands.txt, and of a
    photo alignment.json and, where they were given, landmarks.json.
    """
    text = command_lines(tools, face, edit, paste_mode)
    parts = Path(folder) / "parts"
    paths = _save_pictures(face, view, Path(folder), parts, paste_mode, [face])
    about = {"method": face.method, "steps": face.steps, "seed": face.seed}
    _save_code(parts / "inverted", tools, face, face.code, face.noise, about)
    _save_code(parts / "edited", tools, face, view.code, face.noise, about | {"edit": asdict(edit)})
    return [*paths, _pack(parts, text, Path(folder) / f"{face.name}-latents.zip")]


def save_cast(tools: Tools, cast: Cast, folder, paste_mode: str = "change") -> list[Path]:
    """The same of the expression of a reference: inverted/ and edited/ are one code under two conditions."""
    text, face, inverted = cast_lines(tools, cast, paste_mode), cast.face, cast.inverted
    parts = Path(folder) / "parts"
    paths = _save_pictures(face, cast.view, Path(folder), parts, paste_mode, [face, cast.reference])
    names = list(tools.conditional.known.attributes)
    for name, condition in (("inverted", inverted.condition), ("edited", cast.condition)):
        about = {
            "method": "projector",
            "steps": cast.steps,
            "reference": cast.reference.source,
            CONDITION: {"attributes": names, "values": [condition.tolist()]},
        }
        _save_code(parts / name, tools.conditional.tools, face, cast.view.code, inverted.noise, about)
    return [*paths, _pack(parts, text, Path(folder) / f"{face.name}-latents.zip")]


def _save_pictures(face: Face, view: View, folder: Path, parts: Path, paste_mode: str, uploads) -> list[Path]:
    """Picture and photo into `folder`, what finds the faces again into `parts`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [save_image(view.edited, folder / f"{face.name}-edited.png")]
    if face.source:
        suffix = ".jpg" if Path(face.source).suffix.lower() in (".jpg", ".jpeg", ".jfif") else ".png"
        paths.append(save_image(paste(face, view, paste_mode), folder / f"{face.name}-photo{suffix}"))
        write_json(
            parts / "alignment.json",
            {
                "version": VERSION,
                "settings": asdict(AlignSettings()),
                "faces": [face.alignment.to_dict()],
                "photos": [],
            },
        )
    by_hand = {upload.source: upload.landmarks for upload in uploads if upload.landmarks}
    if by_hand:
        write_json(parts / "landmarks.json", by_hand)
    return paths


def _save_code(folder: Path, tools: Tools, face: Face, code, noise, about: dict) -> None:
    save_latents(
        folder,
        code[None],
        names=[f"{face.alignment.name}.png"],
        space=space_of(tools, code),
        size=tools.size,
        fingerprint=tools.generator.fingerprint,
        alignment=[face.alignment.to_dict()],
        noise=noise,
        extra=about,
    )


def _pack(parts: Path, text: str, archive: Path) -> Path:
    (parts / "commands.txt").write_text(text + "\n", encoding="utf-8")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(parts.rglob("*")):
            if path.is_file():
                file.write(path, path.relative_to(parts).as_posix())
    return archive


def space_of(tools: Tools, code) -> str:
    """w++; of a W generator w, or w+ where the layers differ."""
    if not tools.generator.config.w_space:
        return "w++"
    return "w" if (code == code[:1]).all() else "w+"
