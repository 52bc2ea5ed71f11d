"""The page of demo.py: a photo, sliders, the edited photo. What the controls do is Page; build_page is how it looks.

All work on photos is done by demo_app/editor.py. gradio is imported where a page is built.
"""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from common.cli import ROOT, UserError
from common.images import ImageError, fit_image, image_size, read_image
from demo_app.editor import ROUNDS, Edited, PhotoEditor, PhotoError
from demo_app.models import Models
from demo_app.targets import Target
from faces.align import TEMPLATE, AlignError, parse_landmarks
from faces.photo_file import save_like

SAMPLES = 6  # drawn faces to click
PREVIEW = 1000  # longest side of the photo while it is edited; downloads have the original's
MEGAPIXELS = 64  # of an upload: decoded it takes three bytes per pixel, whatever the size of its file
STEPS, CHUNK = 40, 10  # of the refinement that follows the encoder, and between two looks at it
STILL = 0.02  # a slider moved by less asks for nothing
NOSE = (0.506, 0.623)  # where it lies in an FFHQ frame (perceptual/identity.py), of the side
SLIDERS = {  # attribute -> label, least, most; years are a change, the others what the photo shall show
    "age": ("Age: years younger or older", -20, 30),
    "smile": ("Smile: none to broad", 0, 1),
    "gender": ("Gender: feminine to masculine", 0, 1),
    "eyeglasses": ("Glasses", 0, 1),
}
EXPRESSION = ("smile", "mouth_open", "eyes_open")  # taken from a reference photo
HELP = "Upload a photo with a face, or click a drawn one."


@dataclass
class Session:
    """State of one visitor. rest: readings of the photo before any edit; values: of the sliders."""

    editor: PhotoEditor
    name: str
    file: Path | None = None  # the upload; None for a drawn face
    rest: dict[str, float] = field(default_factory=dict)
    values: list[float] = field(default_factory=list)
    like: dict[str, Target] = field(default_factory=dict)
    layers: range | None = None
    result: Edited | None = None


class Page:
    """The functions behind the controls; each returns or yields {component name: value} for `build_page`."""

    def __init__(self, models: Models, folder: Path):
        self.models, self.folder = models, folder
        self.names = [name for name in SLIDERS if name in models.attributes]

    # -- a photo ------------------------------------------------------------------------------------------------------

    def upload(self, path, aligned, points):
        """Yields the stages from an uploaded file to its first edit by the encoder."""
        if path is None:
            return
        yield {"message": "Finding the face ..."}
        try:
            path = Path(path)
            size = image_size(path)
            if size and size[0] * size[1] > MEGAPIXELS * 1e6:
                raise PhotoError(f"it has more than {MEGAPIXELS} megapixels: make it smaller")
            photo = read_image(path)
            shown = shrink(photo, PREVIEW)
            landmarks = aligned_landmarks(shown.size) if aligned else parse_points(points, shown.width / photo.width)
            editor = PhotoEditor(self.models)
            editor.set_photo(shown, landmarks=landmarks)
        except (ImageError, UserError, AlignError, ValueError) as error:
            yield {"message": f"**{Path(path).name}: {self.tell(error, path)}**"}
            return
        yield self.begin(Session(editor, Path(path).name, path))

    def pick(self, seed: int) -> dict:
        editor = PhotoEditor(self.models)
        editor.set_drawn(seed)
        return self.begin(Session(editor, f"seed{seed:04d}.png"))

    def begin(self, session: Session) -> dict:
        """Sliders to what the photo shows."""
        (scores,) = session.editor.read([session.editor.faces[0].crop])
        session.rest = {name: float(scores[self.models.reader.column(name)]) for name in self.names}
        session.values = [0.0 if name == "age" else round(session.rest[name], 2) for name in self.names]
        values = dict(zip(self.names, session.values, strict=True))
        return {"session": session, **values, **self.show(session)}

    def refine(self, session: Session | None, steps):
        """Yields the photo, better each time, until the inversion has had `steps` steps of refinement."""
        if session is None or session.editor.faces[0].exact:
            return
        while session.editor.faces[0].steps < int(steps):
            yield {"message": f"Refining: {session.editor.faces[0].steps} of {int(steps)} steps ..."}
            try:
                session.editor.refine(min(CHUNK, int(steps) - session.editor.faces[0].steps))
            except PhotoError as error:
                yield {"message": f"**{error}**"}
                return
            yield self.show(session)
        yield self.show(session, message="Refined. Move a slider.")

    # -- an edit ------------------------------------------------------------------------------------------------------

    def move(self, session: Session | None, first, last, *values, rounds: int = 0) -> dict:
        """While a slider is dragged (rounds 0), or when it was let go."""
        if session is None:
            return {"message": f"**{HELP}**"}
        session.values = [float(value) for value in values]
        first, last = int(first), int(last)
        if first > last:
            return {"message": f"**layers {first} to {last}: the first must not come after the last**"}
        every = (first, last) == (0, self.models.generator.config.n_tokens - 1)
        session.layers = None if every else range(first, last + 1)
        return self.show(session, rounds=rounds)

    def reset(self, session: Session | None) -> dict:
        if session is None:
            return {"message": f"**{HELP}**"}
        session.like, session.layers = {}, None
        return self.begin(session)

    def take_expression(self, session: Session | None, path):
        """Yields until the expression of a reference photo is on the face."""
        if session is None or path is None:
            yield {"message": "**first choose a photo, then one of the face whose expression is taken over**"}
            return
        yield {"message": "Inverting the face once more, for its expression ..."}
        try:
            reference = PhotoEditor(self.models)
            reference.set_photo(shrink(read_image(path), PREVIEW))
            (scores,) = reference.read([reference.faces[0].crop])
        except (ImageError, UserError, AlignError) as error:
            yield {"message": f"**{Path(path).name}: {self.tell(error, path)}**"}
            return
        names = [name for name in EXPRESSION if name in self.models.attributes]
        session.like = {name: Target(float(scores[self.models.reader.column(name)])) for name in names}
        yield self.show(session, rounds=ROUNDS)

    def targets(self, session: Session) -> dict[str, Target]:
        """Goals of the sliders that are not at rest."""
        targets = dict(session.like)
        for name, value in zip(self.names, session.values, strict=True):
            if name == "age" and value:
                targets[name] = Target(value, relative=True)
            elif name != "age" and abs(value - session.rest[name]) > STILL:
                targets[name] = Target(value)
        return targets

    def show(self, session: Session, *, rounds: int = 0, message: str | None = None) -> dict:
        """The photo before and after, the read-outs, the aligned face as the generator draws it."""
        try:
            targets = self.targets(session)
            session.result = session.editor.edit(targets, layers=session.layers, rounds=rounds)
        except PhotoError as error:
            return {"message": f"**{error}**"}
        face = session.result.faces[0]
        crops = [session.editor.faces[0].crop, *(Image.fromarray(image) for image in face.changes[0])]
        return {
            "message": message or f"{session.name}: move a slider.",
            "compare": (session.editor.photo, session.result.photo),
            "crops": [(image.resize((128, 128), Image.Resampling.BICUBIC), "") for image in crops],
            "readout": self.readout(face),
            "command": command_of(session.name, targets) if session.file else "",
        }

    def readout(self, face) -> str:
        lines = []
        for name, reading in face.readings.items():
            digits = 0 if reading.kind == "years" else 2
            text = f"**{name.replace('_', ' ')}** {reading.before:.{digits}f} → {reading.photo:.{digits}f}"
            text += f", asked {reading.goal:.{digits}f}, {reading.drawn:.{digits}f} in the drawn face"
            text += f" (at {face.positions.get(name, 0):+.1f})"
            lines.append(text if reading.visible else f"{text}: **no visible effect**")
        error = self.models.reader_error("age")
        return "  \n".join(lines) + (f"  \n*ages are read to ±{error:.0f} years*" if error and lines else "")

    def save(self, session: Session | None) -> dict:
        """The photo at its full size with the edit, as a file to download."""
        if session is None or session.result is None:
            return {}
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        original = session.file or folder / session.name
        if session.file is None:
            session.editor.photo.save(original)
        photo = read_image(original)
        for face in session.result.faces:
            photo = face.paste(photo)
        target = folder / f"{Path(session.name).stem}-edited{Path(session.name).suffix}"
        return {"download": str(save_like(photo, original, target))}

    def tell(self, error: Exception, path) -> str:
        """One sentence without paths of this machine."""
        return str(error).replace(str(path), "the file").replace(str(ROOT) + os.sep, "")


def shrink(photo: Image.Image, longest: int) -> Image.Image:
    """At most `longest` pixels on the longer side."""
    scale = min(1.0, longest / max(photo.size))
    size = [max(1, round(scale * value)) for value in photo.size]
    return photo.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0) if scale < 1 else photo


def aligned_landmarks(size: tuple[int, int]) -> np.ndarray:
    """Five points [5, 2] of a face that fills the centre square of an image as FFHQ frames it."""
    side = min(size)
    return np.insert(TEMPLATE, 2, NOSE, axis=0) * side - 0.5 + (np.array(size) - side) / 2


def parse_points(text: str | None, scale: float) -> np.ndarray | None:
    """Five points typed in any form, ten numbers, in pixels of the photo; None for nothing. Raises AlignError."""
    if not (text or "").strip():
        return None
    numbers = np.fromstring("".join(c if c in "-.0123456789" else " " for c in text), sep=" ").tolist()
    return parse_landmarks(numbers, "the five points")[0] * scale


def command_of(name: str, targets: dict[str, Target]) -> str:
    """The edit as a command line, for the folder that holds the photo."""
    flags = {"age": "age", "gender": "gender", "smile": "smile", "eyeglasses": "glasses", "mouth_open": "mouth_open"}
    words = [
        f"--{flags[key]} {target.value:{'+' if target.relative else ''}.3g}"
        for key, target in targets.items()
        if key in flags
    ]
    return f"python edit_photos.py {name!r} {' '.join(words)}" if words else ""


# -- how it looks ------------------------------------------------------------------------------------------------------

CSS = """
.gradio-container { padding: 8px 16px !important; max-width: 1700px !important; }
#message { min-height: 1.6em; }
#title h1 { font-size: 1.1rem; margin: 0; }
#compare { height: calc(100vh - 190px); min-height: 300px; }
#compare img { object-fit: contain !important; }
#controls { gap: 8px; }
#samples { min-height: 0; }
#samples .grid-container { grid-template-columns: repeat(6, 1fr) !important; padding: 4px !important; }
@media (max-width: 760px) {
  .gradio-container { padding: 4px !important; overflow-x: hidden; }
  #main { flex-direction: column-reverse; flex-wrap: nowrap; }
  #main > * { width: 100%; min-width: 0 !important; }
  #compare { height: 42vh; min-height: 220px; }
  #upload, #samples { order: 2; }
}
"""


def build_page(models: Models, folder: Path):
    """The Gradio page, not yet served. folder: for the files to download."""
    import gradio as gr

    class Blocks(gr.Blocks):
        """Refuses values that no control of the page sends, without a traceback in the log."""

        async def preprocess_data(self, block_fn, *args, **kwargs):
            if not block_fn.fn:  # cancels others: there is nothing to call
                raise gr.Error("this request does not fit the page", print_exception=False)
            try:
                values = await super().preprocess_data(block_fn, *args, **kwargs)
            except Exception as error:  # a component's own reading of a forged request raises anything at all
                raise gr.Error("this request does not fit the page", print_exception=False) from error
            if any(isinstance(value, float) and not math.isfinite(value) for value in values):
                raise gr.Error("numbers must be finite", print_exception=False)
            return values

    page = Page(models, folder)
    with Blocks(title="W++ faces", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        parts, inputs = {"session": gr.State(None)}, {}
        gr.Markdown(f"# W++ faces ({models.generator.path.stem}, for research)", elem_id="title")
        with gr.Row(elem_id="main"):
            with gr.Column(scale=2, min_width=300, elem_id="controls"):
                add_controls(gr, page, parts, inputs)
            with gr.Column(scale=5, min_width=320):
                parts["message"] = gr.Markdown(HELP, elem_id="message")
                parts["compare"] = gr.ImageSlider(
                    label="before | after",
                    show_label=False,
                    type="pil",
                    interactive=False,
                    buttons=["fullscreen"],
                    max_height=2000,
                    elem_id="compare",
                )
                parts["readout"] = gr.Markdown(elem_id="readout")
        with gr.Accordion("Advanced", open=False, elem_id="advanced"):
            add_advanced(gr, models.generator.config.n_tokens, parts, inputs)
        connect(gr, page, parts, inputs)
    return blocks


def add_controls(gr, page: Page, parts: dict, inputs: dict) -> None:
    """Photo, sample faces and sliders."""
    inputs["photo"] = gr.File(
        label="Photo, or click a drawn face below", type="filepath", file_types=["image"], height=100, elem_id="upload"
    )
    inputs["samples"] = gr.Gallery(
        [sample(page.models, seed) for seed in range(SAMPLES)],
        label="drawn faces",
        show_label=False,
        columns=SAMPLES,
        height=80,
        allow_preview=False,
        buttons=[],
        elem_id="samples",
    )
    for name in page.names:
        label, low, high = SLIDERS[name]
        step, value = (1, 0) if name == "age" else (0.01, 0.5)
        parts[name] = gr.Slider(low, high, value, step=step, label=label, elem_id=name)
    with gr.Row():
        inputs["reset"] = gr.Button("Reset", size="sm", elem_id="reset")
        parts["download"] = gr.DownloadButton("Download", size="sm", variant="primary", elem_id="download")


def add_advanced(gr, n_tokens: int, parts: dict, inputs: dict) -> None:
    """Layers, refinement, the expression of a reference, landmarks by hand, the aligned face, the command."""
    with gr.Row():
        inputs["first"] = gr.Slider(0, n_tokens - 1, 0, step=1, label="from layer (0: coarsest)", elem_id="first")
        inputs["last"] = gr.Slider(0, n_tokens - 1, n_tokens - 1, step=1, label="to layer", elem_id="last")
        inputs["steps"] = gr.Slider(0, 500, STEPS, step=CHUNK, label="steps of refinement", elem_id="steps")
        inputs["again"] = gr.Button("Refine further", size="sm", elem_id="refine")
    with gr.Row():
        inputs["reference"] = gr.File(
            label="A face whose expression is taken over", type="filepath", height=100, elem_id="reference"
        )
        inputs["like"] = gr.Button("Take over its expression", size="sm", elem_id="like")
        inputs["aligned"] = gr.Checkbox(label="the photo is an aligned face already", elem_id="aligned")
        inputs["points"] = gr.Textbox(
            label="face not found? five points by hand: eyes, nose, mouth corners (pixels)", elem_id="points"
        )
    parts["crops"] = gr.Gallery(
        label="aligned, inverted, edited", columns=3, height=160, allow_preview=False, elem_id="crops"
    )
    parts["command"] = gr.Textbox(label="the same by a command", interactive=False, elem_id="command")


def sample(models: Models, seed: int) -> Image.Image:
    editor = PhotoEditor(models)
    editor.set_drawn(seed)
    return fit_image(editor.photo, 96)


def connect(gr, page: Page, parts: dict, inputs: dict) -> None:
    """Events: each function's answer, {component name: value}, goes to the components of those names."""
    first, last, photo, samples = (inputs[name] for name in ("first", "last", "photo", "samples"))
    outputs, sliders = list(parts.values()), [parts[name] for name in page.names]

    def to_components(answer: dict):
        return {parts[name]: value for name, value in answer.items()} or gr.skip()

    def streaming(function):
        def stream(*inputs):
            for answer in function(*inputs):
                yield to_components(answer)

        return stream

    def plain(function, **settings):
        return lambda *inputs: to_components(function(*inputs, **settings))

    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    refine = [streaming(page.refine), [parts["session"], inputs["steps"]], outputs]
    save = [plain(page.save), [parts["session"]], [parts["download"]]]
    running = []

    def then_refine(event):
        """The refinement starts by itself; a new photo calls it off."""
        refining = event.then(*refine, **quiet)
        running.append(refining)
        refining.then(*save, **quiet)

    def pick(event=None):
        data = getattr(event, "_data", None)  # not SelectData: a forged request has no such event
        seed = data.get("index") if isinstance(data, dict) else None
        return to_components(page.pick(seed if seed in range(SAMPLES) else 0))

    upload = [photo, inputs["aligned"], inputs["points"]]
    pick.__annotations__["event"] = gr.EventData  # gradio looks here; a string would not resolve
    uploaded = photo.upload(streaming(page.upload), upload, outputs, **quiet)
    picked = samples.select(pick, None, outputs, **quiet)
    then_refine(uploaded)
    then_refine(inputs["again"].click(lambda: None, None, None, **quiet))
    picked.then(*save, **quiet)
    for trigger in (photo.upload, samples.select, photo.clear):
        trigger(None, None, None, cancels=running, queue=False, api_visibility="private")
    move = [parts["session"], first, last, *sliders]
    dragged = [slider.input for slider in sliders]  # also by a typed number, which has no release
    moved = gr.on(dragged, plain(page.move), move, outputs, trigger_mode="always_last", **quiet)
    released = gr.on(
        [slider.release for slider in (*sliders, first, last)], plain(page.move, rounds=ROUNDS), move, outputs, **quiet
    )
    session, reference = [parts["session"]], inputs["reference"]
    reset = inputs["reset"].click(plain(page.reset), session, outputs, **quiet)
    like = inputs["like"].click(streaming(page.take_expression), [*session, reference], outputs, **quiet)
    for event in (moved, released, reset, like):
        event.then(*save, **quiet)
