"""The functions behind the controls of demo.py's page: a photo, sliders, the edited photo."""

import os
import re
import shlex
import shutil
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from common.cli import ROOT
from common.images import image_size, read_image
from demo_app.editor import ROUNDS, Edited, PhotoEditor, PhotoError, SmallFaceError, expression_of, shrink
from demo_app.flags import QUALITY
from demo_app.models import Models
from demo_app.targets import FLAGS, Target
from faces.align import parse_landmarks
from faces.paste import save_like

PREVIEW = 1000  # longest side of the photo while it is edited; downloads have the original's
MEGAPIXELS = 64  # of an upload: decoded it takes three bytes per pixel, whatever the size of its file
CHUNK = 10  # steps of refinement between two looks at it
UNMOVED = 0.02  # a slider this near to its start changes nothing
SLIDERS = {  # attribute -> label, least, most; age is a change in years, the others are target probabilities
    "age": ("Age: years younger or older", -20, 30),
    "smile": ("Smile: none to broad", 0, 1),
    "gender": ("Gender: feminine to masculine", 0, 1),
    "eyeglasses": ("Glasses: off to on", 0, 1),
}
HELP = "Upload a photo with a face, or click a drawn one."


@dataclass
class Session:
    """One photo of one visitor. before: readings of the photo before any edit; values: of the sliders."""

    editor: PhotoEditor
    name: str
    file: Path | None = None  # the upload; None for a drawn face
    before: dict[str, float] = field(default_factory=dict)
    values: list[float] = field(default_factory=list)
    expression: dict[str, Target] = field(default_factory=dict)  # of the reference, beside what sliders show
    like: str = ""  # name of the reference
    result: Edited | None = None
    rounds: int = 0  # of corrections of the result
    replaced: bool = False  # by another photo: its refinement ends
    gone: bool = False  # the page shows another photo: an answer that comes late is left out
    downloads: list[Path] = field(default_factory=list)  # folders of the last two files to download
    lock: threading.RLock = field(default_factory=threading.RLock)  # an editor is for one thread, events are of several


class Page:
    """The functions behind the controls; each returns or yields {component name: value} for `build_page`."""

    def __init__(self, models: Models, folder: Path, flags: str = ""):
        self.models, self.folder, self.flags = models, folder, flags
        self.names = [name for name in SLIDERS if name in models.attributes]

    def upload(self, path, points, session: Session | None = None):
        """Yield the stages from an uploaded file to the encoder's inversion. session: of the photo before."""
        self.replace(session)
        if path is None:
            return
        yield {"message": "Finding the face ..."}
        path, editor = Path(path), PhotoEditor(self.models)
        try:
            width, height = image_size(path) or (0, 0)
            if width * height > MEGAPIXELS * 1e6:
                raise PhotoError(f"it has more than {MEGAPIXELS} megapixels: make it smaller")
            photo = read_image(path)
            try:
                self.open(editor, photo, points, PREVIEW)
            except SmallFaceError as error:  # in the preview; the photo may have enough pixels
                if max(photo.size) <= PREVIEW:
                    raise
                self.open(editor, photo, points, int(1.1 * PREVIEW * error.least / error.side))
            yield {"points": ""} | self.start(Session(editor, path.name, path), session)  # points are of one photo
        except ValueError as error:
            yield self.refuse(path, error)

    def open(self, editor: PhotoEditor, photo: Image.Image, points: str | None, longest: int) -> None:
        """Find and encode the face, in a copy of the photo of at most `longest` pixels on the longer side."""
        shown = shrink(photo, longest)
        editor.set_photo(shown, landmarks=parse_points(points, shown.width / photo.width))

    def pick(self, seed: int, session: Session | None = None) -> dict:
        """A face that the generator draws."""
        self.replace(session)
        return self.start(Session(self.draw(seed), f"seed{seed:04d}.png"), session)

    def draw(self, seed: int) -> PhotoEditor:
        editor = PhotoEditor(self.models)
        editor.set_drawn(seed)
        return editor

    def replace(self, session: Session | None) -> dict:
        """End the refinement of a photo that another one replaces, or nothing."""
        if session is not None:
            session.replaced = True
        return {"message": HELP}

    def resume(self, session: Session | None) -> dict:
        """Let the photo be refined that is still shown: no other one has replaced it."""
        if session is not None:
            session.replaced = False
        return {}

    def forget(self, session: Session | None) -> None:
        """Remove the files to download of a visitor who has left."""
        for folder in session.downloads if session else ():
            shutil.rmtree(folder, ignore_errors=True)

    def start(self, session: Session, before: Session | None = None) -> dict:
        """Sliders to what the photo shows. before: the session whose files the next ones to download replace."""
        session.downloads = before.downloads if before else session.downloads
        session.before = session.editor.read_faces(self.names)
        session.values = [0.0 if name == "age" else round(session.before[name], 2) for name in self.names]
        answer = {"session": session, **dict(zip(self.names, session.values, strict=True)), **self.show(session)}
        if before:
            before.gone = True
        return answer

    def refine(self, session: Session | None, steps):
        """Yield the photo, better each time, until the inversion has had `steps` steps of refinement."""
        if session is None or session.editor.faces[0].exact:
            return
        face, steps = session.editor.faces[0], int(steps)
        while face.steps < steps and not session.replaced:
            yield {"message": f"Refining: {face.steps} of {steps} steps ..."}
            try:
                with session.lock:
                    session.editor.refine(min(CHUNK, steps - face.steps))
            except PhotoError as error:
                yield {"message": f"**{error}**"}
                return
            last = {"message": "Refined. Move a slider.", "rounds": ROUNDS} if face.steps >= steps else {}
            answer = self.show(session, **last)
            if session.replaced:
                return
            yield answer

    def move(self, session: Session | None, first, last, *values, rounds: int = 0) -> dict:
        """Edit while a slider is dragged (rounds 0) or after its release. first, last: layers that move."""
        if session is None:
            return {"message": f"**{HELP}**"}
        layers = range(int(first), int(last) + 1)
        if not layers:
            return {"message": f"**layers {first:g} to {last:g}: the first must not come after the last**"}
        layers = layers if len(layers) < self.models.generator.config.n_tokens else None
        with session.lock:
            before, session.values = session.values, [float(value) for value in values]
            if rounds < session.rounds and (session.values, layers) == (before, session.editor.layers):
                return {}  # the release has overtaken the last of its drags
            session.editor.set_layers(layers)
            return self.show(session, rounds=rounds)

    def reset(self, session: Session | None) -> dict:
        if session is None:
            return {"message": f"**{HELP}**"}
        with session.lock:
            session.expression = {}
            session.editor.set_layers(None)
            return self.start(session)

    def take_expression(self, session: Session | None, path):
        """Yield until the expression of a reference photo is on the face."""
        if session is None or path is None:
            yield {"message": "**first choose a photo, then one of the face whose expression is taken over**"}
            return
        yield {"message": "Reading its expression ..."}
        try:
            taken = expression_of(path, self.models)
            with session.lock:  # sliders show what they move; what has none is kept beside them
                values = zip(self.names, session.values, strict=True)
                session.values = [round(taken[name].value, 2) if name in taken else value for name, value in values]
                session.expression = {name: target for name, target in taken.items() if name not in self.names}
                session.like = Path(path).name
                sliders = dict(zip(self.names, session.values, strict=True))
                answer = self.show(session, rounds=ROUNDS)
            yield {} if session.gone else sliders | answer
        except ValueError as error:
            yield self.refuse(path, error)

    def show(self, session: Session, *, rounds: int = 0, message: str | None = None) -> dict:
        """The photo before and after, the read-outs, the aligned face as the generator draws it; nothing of a photo
        that another one has replaced meanwhile."""
        with session.lock:
            targets = {}
            for name, value in zip(self.names, session.values, strict=True):
                moved = value if name == "age" else abs(value - session.before[name]) > UNMOVED
                targets |= {name: Target(value, relative=name == "age")} if moved else {}
            try:
                result = session.result = session.editor.edit(session.expression | targets, rounds=rounds)
            except PhotoError as error:
                return {"message": f"**{error}**"}
            session.rounds = rounds
        if session.gone:
            return {}
        face = result.faces[0]
        drawn = [face.changes[0].unedited, *(change.edited for change in face.changes)]
        crops = [face.face.crop, *map(Image.fromarray, drawn)]
        return {
            "message": message or f"{session.name}: move a slider.",
            "compare": (session.editor.photo, result.photo),
            "crops": [(image.resize((128, 128), Image.Resampling.BICUBIC), "") for image in crops],
            "readout": self.readout(face.readings),
            "distances": ", ".join(f"{name} {position:+.2f}" for name, position in face.positions.items()),
            "command": self.command(session, targets),
        }

    def command(self, session: Session, targets: dict[str, Target]) -> str:
        """The edit as a command line; empty for what edit_photos.py does not take: drawn faces, points by hand, some of
        the layers."""
        face, like = session.editor.faces[0], session.like if session.expression else ""
        if face.alignment.score is None or session.editor.layers:
            return ""
        quality = max((name for name, steps in QUALITY.items() if steps <= face.steps), key=QUALITY.get)
        return command_of(session.name, targets, like, f"--quality {quality} {self.flags}".rstrip())

    def readout(self, readings) -> str:
        words = {name.replace("_", " "): reading.describe().replace("->", "→") for name, reading in readings.items()}
        lines = [f"**{name}** {text}" for name, text in words.items()]
        error = self.models.scorer.errors.get("age")
        return "  \n".join([*lines, f"*ages are read to ±{error:.0f} years*"] if error and "age" in readings else lines)

    def save(self, session: Session | None) -> dict:
        """The photo at its full size with the edit, as a file to download. Of earlier ones the last stays, since its
        link may have been clicked in this moment."""
        if session is None or session.result is None:
            return {}
        if session.file and not session.file.is_file():  # see delete_cache in layout.py
            return {"message": "**the upload was deleted after a day: upload the photo again**"}
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        original = session.file or folder / session.name
        if session.file is None:
            session.editor.photo.save(original)
        photo = read_image(original)
        for face in session.result.faces:
            photo = face.paste(photo)
        target = folder / f"{Path(session.name).stem}-edited{Path(session.name).suffix}"
        answer = {"download": str(save_like(photo, original, target))}
        session.downloads.append(folder)
        while len(session.downloads) > 2:
            shutil.rmtree(session.downloads.pop(0), ignore_errors=True)
        return answer

    def refuse(self, path, error: Exception) -> dict:
        """One sentence without paths of this machine."""
        reason = str(error).replace(str(path), "the file").replace(str(ROOT) + os.sep, "")
        return {"message": f"**{Path(path).name}: {reason}**"}


def command_of(name: str, targets: dict[str, Target], like: str = "", flags: str = "") -> str:
    """An edit as a command line, for the folder that holds the photo and the reference `like`; flags: further ones."""
    words = [f"--{FLAGS[k]} {target.value:{'+' if target.relative else ''}.3g}" for k, target in targets.items()]
    words += [f"--like {quote(like)}"] if like else []
    return " ".join(["python edit_photos.py", quote(name), *words, flags]).rstrip() if words else ""


def quote(name: str) -> str:
    """A file's name as a word of a command line, not to be taken for a flag."""
    return shlex.quote(f"./{name}" if name.startswith("-") else name)


def parse_points(text: str | None, scale: float) -> np.ndarray | None:
    """Five points typed in any form, ten numbers, in pixels of a photo -> [5, 2] in the photo at `scale` of its size;
    None for nothing. Raises AlignError."""
    if not (text or "").strip():
        return None
    numbers = [float(number) for number in re.findall(r"-?\d*\.?\d+", text)]
    return (parse_landmarks(numbers, "the five points")[0] + 0.5) * scale - 0.5  # pixel centres are whole numbers
