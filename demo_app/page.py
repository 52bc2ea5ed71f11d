"""The page of demo.py: what its buttons do (Page), how it looks (build_page), and how it is served (serve).

All of the work is in demo_app/session.py, refinement.py and commands.py; gradio is imported where a page is built.
"""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from PIL import Image

from demo_app.commands import cast_lines, command_lines, save_cast, save_results
from demo_app.expression import Cast, ConditionalInversion, cast_expression, compare
from demo_app.refinement import MOST_STEPS, Background, Refinement
from demo_app.session import (
    PASTES,
    REACH,
    Edit,
    Face,
    SessionError,
    Tools,
    draw_face,
    invert,
    paste,
    read_out,
    render_edit,
    take_photo,
    transfer_smile,
)
from faces.align import AlignError, parse_landmarks

DRAWN = 9  # faces to pick from
SHOWN = 288  # pixels at which faces are shown
PREVIEW = 900  # longest side of the photo as it is shown
FIRST = "first take a face: upload a photo or pick one"
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"  # the browser asks no other server

CSS = """
#message { border: 1px solid #bbb; border-radius: 6px; padding: 6px 12px; }
#readout th, #readout td { padding: 3px 10px; white-space: nowrap; }
#readout table { width: 100%; }
#readout td:first-child { white-space: normal; width: 80%; }
"""


# -- what the buttons do -------------------------------------------------------------------------------------------


@dataclass
class Sitting:
    """What one visitor works on."""

    face: Face | None = None
    work: Background | None = None  # a projector in the background
    inverted: ConditionalInversion | None = None  # of the face, in the conditional generator; done
    cast: Cast | None = None  # what is shown instead of the sliders' edit

    def take(self, face: Face) -> None:
        self.stop()
        self.face, self.cast, self.inverted = face, None, None

    def stop(self) -> None:
        if self.work is not None:
            self.work.cancel()


def enlarged(picture) -> Image.Image:
    """A picture at the size in which faces are shown."""
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    return picture.resize((SHOWN, SHOWN), Image.Resampling.BICUBIC)


def table(rows) -> str:
    """The read-outs as Markdown."""
    if not rows:
        return "*Neither a scorer nor an identity network is here: nothing is read.*"
    lines = ["| | photo | inversion | edited |", "|---|---:|---:|---:|"]
    lines += [
        f"| **{what}** ({unit}) | {photo} | {inversion} | {edited} |" for what, unit, photo, inversion, edited in rows
    ]
    return "\n".join(lines)


class Page:
    """The functions behind the buttons. Settings arrive as (first layer, last layer, paste mode, one value per
    boundary); a user's mistake becomes the message, and everything else stays as it is."""

    def __init__(self, tools: Tools, folder: Path):
        import gradio

        self.tools, self.folder, self.skip = tools, folder, gradio.skip
        self.update = gradio.update

    def edit_of(self, settings) -> tuple[Edit, str]:
        first, last, paste_mode, *values = settings
        distances = {name: round(float(value), 2) for name, value in zip(self.tools.boundaries, values, strict=True)}
        return Edit(distances, (int(first), int(last))), paste_mode

    def mistake(self, error) -> list:
        return [f"**{error}**", *[self.skip()] * 7]

    def show(self, sitting: Sitting, *settings, message: str | None = None) -> list:
        """Message, aligned face, inversion, edit, photo, read-outs, commands, files (which are out of date)."""
        face, tools, cast = sitting.face, self.tools, sitting.cast
        if face is None:
            return self.mistake(FIRST)
        try:
            edit, paste_mode = self.edit_of(settings)
            view = cast.view if cast else render_edit(tools, face, edit)
            photo = paste(face, view, paste_mode, longest=PREVIEW)
        except SessionError as error:
            return self.mistake(error)
        commands = cast_lines(tools, cast, paste_mode) if cast else command_lines(tools, face, edit, paste_mode)
        photo = self.update(value=photo, visible=bool(face.source))
        return [
            self.skip() if message is None else message,
            enlarged(face.crop),
            enlarged(view.inversion),
            enlarged(view.edited),
            photo,
            table(read_out(tools, face, view)),
            commands,
            self.update(value=None, visible=False),
        ]

    def move(self, sitting: Sitting, *settings) -> list:
        """As `show`, of the sliders: the expression of a reference is let go."""
        sitting.cast = None
        return self.show(sitting, *settings)

    def upload(self, sitting: Sitting, path, aligned, points, *settings) -> list:
        if path is None:
            return [self.skip()] * 8
        try:
            by_hand = "aligned" if aligned else parse_points(points) if (points or "").strip() else None
            face = invert(self.tools, take_photo(self.tools, path, landmarks=by_hand))
        except (SessionError, AlignError) as error:
            return self.mistake(error)
        sitting.take(face)
        how = "inverted by the encoder" if face.method == "encoder" else "there is no encoder: refine the mean face"
        note = f" ({face.note})" if face.note else ""
        return self.show(sitting, *settings, message=f"{face.source}: aligned{note}, {how}.")

    def pick(self, sitting: Sitting, seed: int, *settings) -> list:
        sitting.take(draw_face(self.tools, seed))
        return self.show(sitting, *settings, message=f"Seed {seed}: drawn by the generator, so its code is exact.")

    def drawn(self, first: int) -> list:
        """Faces to pick from."""
        return [enlarged(draw_face(self.tools, seed).photo) for seed in range(first, first + DRAWN)]

    def refine(self, sitting: Sitting, steps):
        """Yields (message, picture of the inversion) until the projector is done."""
        if sitting.face is None:
            yield f"**{FIRST}**", self.skip()
            return
        sitting.stop()
        try:
            work = sitting.work = Refinement(self.tools, sitting.face, int(steps))
        except SessionError as error:
            yield f"**{error}**", self.skip()
            return
        yield from self.follow(work, "Refining")
        if work.result is not None and sitting.face is work.face:
            sitting.face, sitting.cast = work.result, None
            yield f"Refined in {work.result.steps} steps, loss {work.loss:.3f}.", self.skip()

    def follow(self, work: Background, doing: str):
        """Yields (message, picture) while a projector works; it is called off when the visitor leaves."""
        try:
            while work.running:
                work.join(0.4)
                text = f"{doing}: step {work.step} of {work.steps}, loss {work.loss:.3f}" if work.step else doing
                yield text, self.skip() if work.picture is None or work.cancelled else enlarged(work.picture)
        finally:
            work.cancel()  # the visitor has left; too late for one that is done
        if work.error:
            yield f"**{work.error}**", self.skip()
        elif work.result is None:
            yield f"{doing} was stopped; the inversion is as it was before.", self.skip()

    def lender(self, sitting: Sitting, path, aligned) -> Face:
        """The reference face. SessionError when there is none, or none to lend to."""
        if sitting.face is None:
            raise SessionError("first take a face, then a reference for its expression")
        if path is None:
            raise SessionError("first upload a reference: a photo of the face that lends its expression")
        return take_photo(self.tools, path, landmarks="aligned" if aligned else None)

    def transfer(self, sitting: Sitting, path, aligned, *settings) -> list:
        """The smile slider, then as `show`."""
        try:
            reference = self.lender(sitting, path, aligned)
            edit, _ = self.edit_of(settings)
            found, wanted, reached = transfer_smile(self.tools, sitting.face, reference, edit)
        except SessionError as error:
            return [self.skip(), *self.mistake(error)]
        settings = list(settings)
        settings[3 + list(self.tools.boundaries).index("smile")] = found
        message = f"The reference smiles at {wanted:.2f}; at {found:+.2f} the face smiles at {reached:.2f}."
        sitting.cast = None
        return [found, *self.show(sitting, *settings, message=message)]

    def cast(self, sitting: Sitting, path, aligned, steps):
        """Yields (message, picture of the inversion) until the reference's expression is on the face; a face is
        inverted in the conditional generator once, for all references."""
        sitting.stop()
        try:
            reference, face = self.lender(sitting, path, aligned), sitting.face
            work = sitting.inverted
            if work is None or work.face.crop is not face.crop or work.steps != int(steps):
                work = sitting.work = ConditionalInversion(
                    self.tools.conditional, self.tools.perceptual, face, int(steps)
                )
                yield from self.follow(work, "Inverting in the conditional generator")
        except SessionError as error:
            yield f"**{error}**", self.skip()
            return
        if work.result is None or sitting.face is not face:
            return
        sitting.inverted = work
        cast = sitting.cast = cast_expression(self.tools.conditional, face, work.result, reference, work.steps)
        yield f"The expression of {reference.source} was cast: {compare(self.tools.conditional, cast)}.", self.skip()

    def settle(self, sitting: Sitting, *values) -> list:
        """The sliders: at rest when a cast is shown, which they have no part in."""
        return [0] * len(values) if sitting.cast else list(values)

    def files(self, sitting: Sitting, *settings) -> list:
        """Message and files to download."""
        if sitting.face is None:
            return [f"**{FIRST}**", self.skip()]
        folder = tempfile.mkdtemp(dir=self.folder)
        try:
            edit, paste_mode = self.edit_of(settings)
            if sitting.cast:
                paths = save_cast(self.tools, sitting.cast, folder, paste_mode)
            else:
                view = render_edit(self.tools, sitting.face, edit)
                paths = save_results(self.tools, sitting.face, edit, view, folder, paste_mode)
        except SessionError as error:
            return [f"**{error}**", self.skip()]
        return [self.skip(), self.update(value=[str(path) for path in paths], visible=True)]


def parse_points(text: str) -> list:
    """Five points typed in any form: ten numbers."""
    numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)]
    if len(numbers) != 10:
        raise SessionError(
            f"five points are ten numbers (right eye, left eye, nose, right and left mouth corner), got {len(numbers)}"
        )
    return parse_landmarks(numbers, "the five points")[0].tolist()


# -- how it looks --------------------------------------------------------------------------------------------------


def build_page(tools: Tools, folder: Path):
    """The Gradio page, not yet served. folder: for the files to download."""
    import gradio as gr

    page, config = Page(tools, folder), tools.generator.config
    n_layers = tools.n_layers
    lends = tools.conditional is not None, "smile" in tools.boundaries and tools.scorer is not None
    with gr.Blocks(title="W++ faces", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown(
            f"# W++ faces\nTake a face, move its age, gender and smile, put it back. The generator ({tools.ckpt.stem}) "
            f"draws {config.size}x{config.size} pixels; its models are for research and non-commercial use."
        )
        message = gr.Markdown("Upload a photo, or pick a face that the generator has drawn.", elem_id="message")
        sitting, first_seed = gr.State(Sitting(), delete_callback=Sitting.stop), gr.State(0)
        names = list(tools.boundaries)
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                photo = gr.File(label="Photo", type="filepath", height=140, elem_id="upload")
                with gr.Accordion("The face is not found?", open=False, elem_id="byhand"):
                    aligned = gr.Checkbox(label="the picture is an aligned face already")
                    points = gr.Textbox(
                        label="five points by hand, in pixels",
                        elem_id="points",
                        placeholder="x y of right eye, left eye, nose, right and left mouth corner",
                    )
                    again = gr.Button("Take the photo again", size="sm", elem_id="again")
                drawn = gr.Gallery(
                    page.drawn(0),
                    label="Or a drawn face (nobody's)",
                    columns=3,
                    height=370,
                    allow_preview=False,
                    buttons=[],
                    elem_id="drawn",
                )
                others = gr.Button("Other faces", size="sm", elem_id="others")
                reference = gr.File(
                    label="Reference: a face that lends its expression",
                    type="filepath",
                    height=140,
                    visible=any(lends),
                    elem_id="reference",
                )
                framed = gr.Checkbox(
                    label="the reference is an aligned face already", visible=any(lends), elem_id="framed"
                )
                cast = gr.Button("Cast its expression", size="sm", visible=lends[0], elem_id="cast")
                smile_only = gr.Button("Only its smile, by the slider", size="sm", visible=lends[1], elem_id="lend")
                mode = gr.Radio(
                    [("only what the edit changed", PASTES[0]), ("the face as drawn", PASTES[1])],
                    value=PASTES[0],
                    label="Put back into the photo",
                    elem_id="mode",
                )
                prepare = gr.Button("Prepare downloads", variant="primary", elem_id="prepare")
                files = gr.File(
                    label="Picture, photo, latents with commands",
                    file_count="multiple",
                    visible=False,
                    interactive=False,
                    elem_id="files",
                )
            with gr.Column(scale=5):
                with gr.Row():
                    pictures = [
                        gr.Image(
                            label=label,
                            height=SHOWN,
                            buttons=[],
                            interactive=False,
                            format="png",
                            elem_id=label.lower(),
                        )
                        for label in ("Aligned", "Inversion", "Edited")
                    ]
                with gr.Row(equal_height=True):
                    steps = gr.Slider(
                        50, min(500, MOST_STEPS), 250, step=10, label="steps of the projector", scale=2, elem_id="steps"
                    )
                    refine = gr.Button("Refine the inversion", elem_id="refine")
                    stop = gr.Button("Stop", elem_id="stop")
                gr.Markdown(
                    "How far to go, in standard deviations of the generator's faces, and in which layers (0 is "
                    "the coarsest):"
                    if names
                    else f"*No boundaries for {tools.ckpt.name} are here: edit_attribute.py fits them.*"
                )
                with gr.Row():
                    sliders = [gr.Slider(-REACH, REACH, 0, step=0.5, elem_id=name, label=name) for name in names]
                with gr.Row(equal_height=True):
                    first = gr.Slider(0, n_layers - 1, 0, step=1, label="from layer", elem_id="first")
                    last = gr.Slider(0, n_layers - 1, n_layers - 1, step=1, label="to layer", elem_id="last")
                    reset = gr.Button("Reset", elem_id="reset")
                readout = gr.Markdown(elem_id="readout")
                pasted = gr.Image(
                    label="The photo with the edited face",
                    height=420,
                    buttons=["fullscreen"],
                    interactive=False,
                    elem_id="pasted",
                )
        commands = gr.Code(
            label="The same by commands", language="shell", wrap_lines=True, interactive=False, elem_id="commands"
        )

        settings = [first, last, mode, *sliders]
        outputs = [message, *pictures, pasted, readout, commands, files]
        gr.on([photo.upload, again.click], page.upload, [sitting, photo, aligned, points, *settings], outputs)
        drawn.select(_picked(page), [sitting, first_seed, *settings], outputs)
        others.click(lambda seed: (seed + DRAWN, page.drawn(seed + DRAWN)), first_seed, [first_seed, drawn])
        anew = [page.show, [sitting, *settings], outputs]
        gr.on(
            [part.input for part in (first, last, *sliders)],
            page.move,
            *anew[1:],
            trigger_mode="always_last",
            show_progress="hidden",
        )
        mode.input(*anew, show_progress="hidden")
        reset.click(lambda: [0, n_layers - 1, *[0] * len(sliders)], None, [first, last, *sliders]).then(
            page.move, *anew[1:]
        )
        for button, work, inputs in (
            (refine, page.refine, [sitting, steps]),
            (cast, page.cast, [sitting, reference, framed, steps]),
        ):
            button.click(work, inputs, [message, pictures[1]], show_progress="hidden").then(
                *anew, show_progress="hidden"
            ).then(page.settle, [sitting, *sliders], sliders, show_progress="hidden")
        stop.click(lambda sitting: sitting.stop(), sitting)
        if "smile" in names:
            smile = sliders[names.index("smile")]
            smile_only.click(page.transfer, [sitting, reference, framed, *settings], [smile, *outputs])
        prepare.click(page.files, [sitting, *settings], [message, files])
    return blocks


def _picked(page: Page):
    import gradio as gr

    def picked(event, sitting, first_seed, *settings):
        return page.pick(sitting, first_seed + event.index, *settings)

    picked.__annotations__["event"] = gr.SelectData  # gradio looks here; a string would not resolve
    return picked


# -- how it is served ----------------------------------------------------------------------------------------------


class OwnFilesOnly:
    """ASGI: refuses to fetch other servers' files through this one, and has the browser load nothing from elsewhere."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def send_with_policy(event):
            if event["type"] == "http.response.start":
                event["headers"] = [*event["headers"], (b"content-security-policy", POLICY.encode())]
            await send(event)

        if scope["type"] == "http" and re.search(r"(file=|proxy=)/*https?:", unquote(scope["path"]), re.IGNORECASE):
            await send_with_policy({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"files of other servers are not fetched"})
            return
        await self.app(scope, receive, send_with_policy)


def serve(tools: Tools, folder: Path, *, host: str, port: int, max_upload_mb: float):
    """Start to answer, in threads of its own; returns the Blocks, whose close() ends it. OSError for a port in use."""
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "GRADIO_TEMP_DIR": str(folder),
        "GRADIO_EXAMPLES_CACHE": str(folder / "examples"),
    }
    import gradio as gr
    from starlette.middleware import Middleware

    blocks = build_page(tools, folder)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=int(max_upload_mb * 1e6),
        allowed_paths=[],
        theme=theme,
        css=CSS,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        app_kwargs={"middleware": [Middleware(OwnFilesOnly)], "docs_url": None, "redoc_url": None},
    )
    return blocks
