"""The look of demo.py's page, and which function of demo_app/page.py answers which control."""

import math
from pathlib import Path

from demo_app.editor import ROUNDS, shrink
from demo_app.models import Models
from demo_app.page import CHUNK, HELP, SLIDERS, Page

SAMPLES = 6  # drawn faces to click
STEPS = 20  # of the refinement that follows the encoder
CSS = Path(__file__).with_name("page.css").read_text(encoding="utf-8")


def build_page(models: Models, folder: Path, flags: str = ""):
    """The Gradio page, not yet served. folder: for the files to download; flags: of the models, for a command line."""
    import gradio as gr

    class Blocks(gr.Blocks):
        """Controls that refuse values which none of them sends, without a traceback in the log."""

        async def preprocess_data(self, block_fn, *args, **kwargs):
            try:
                values = await super().preprocess_data(block_fn, *args, **kwargs)
            except Exception as error:  # a component's own reading of a forged request raises anything at all
                raise gr.Error("this request does not fit the page", print_exception=False) from error
            if any(isinstance(value, float) and not math.isfinite(value) for value in values):
                raise gr.Error("numbers must be finite", print_exception=False)
            return values

    page = Page(models, folder, flags)
    with Blocks(title="W++ faces", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        parts, inputs = {"session": gr.State(None, delete_callback=page.forget)}, {}
        gr.Markdown(f"# W++ faces ({models.generator.path.stem}, for research)", elem_id="title")
        with gr.Row(elem_id="main"):
            with gr.Column(scale=2, min_width=300, elem_id="controls"):
                add_controls(gr, page, parts, inputs)
            with gr.Column(scale=5, min_width=320):
                parts["message"] = gr.Markdown(HELP, elem_id="message")
                look = {"show_label": False, "buttons": ["fullscreen"], "slider_position": 30, "elem_id": "compare"}
                parts["compare"] = gr.ImageSlider(label="before | after", type="pil", interactive=False, **look)
                parts["readout"] = gr.Markdown(elem_id="readout")
        with gr.Accordion("Advanced", open=False, elem_id="advanced"):
            add_advanced(gr, models.generator.config.n_tokens, parts, inputs)
        connect(gr, page, parts, inputs)
    return blocks


def add_controls(gr, page: Page, parts: dict, inputs: dict) -> None:
    """Photo, sample faces and sliders."""
    label, kind = "Photo, or click a drawn face below", {"type": "filepath", "file_types": ["image"]}
    inputs["photo"] = gr.File(label=label, height=100, elem_id="upload", **kind)
    look = {"show_label": False, "columns": SAMPLES, "height": 80, "allow_preview": False, "buttons": []}
    faces = [shrink(page.draw(seed).photo, 96) for seed in range(SAMPLES)]
    inputs["samples"] = gr.Gallery(faces, label="drawn faces", elem_id="samples", **look)
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
        label = "A face whose expression is taken over"
        inputs["reference"] = gr.File(label=label, type="filepath", height=100, elem_id="reference")
        inputs["like"] = gr.Button("Take over its expression", size="sm", elem_id="like")
        label = "face not found? five points by hand: eyes, nose, mouth corners (pixels)"
        parts["points"] = gr.Textbox(label=label, elem_id="points")
    label = "moved by (change of the condition, or standard deviations of a boundary)"
    parts["distances"] = gr.Textbox(label=label, interactive=False, elem_id="distances")
    parts["command"] = gr.Textbox(label="the same by a command", interactive=False, elem_id="command")
    label = "aligned, inverted, edited (one image per part of the face)"
    parts["crops"] = gr.Gallery(label=label, columns=5, height=160, allow_preview=False, elem_id="crops")


def connect(gr, page: Page, parts: dict, inputs: dict) -> None:
    """Events: each function's answer, {component name: value}, goes to the components of those names."""
    session, photo, outputs = parts["session"], inputs["photo"], list(parts.values())

    def to_components(answer: dict):
        return {parts[name]: value for name, value in answer.items()} or gr.skip()

    def streaming(function):
        def stream(*inputs):
            answer = None
            for answer in function(*inputs):
                yield to_components(answer)
            if answer is None:
                yield gr.skip()  # of a function that yields nothing gradio empties all outputs

        return stream

    def plain(function, **settings):
        return lambda *inputs: to_components(function(*inputs, **settings))

    def pick(session, event=None):
        data = getattr(event, "_data", None)  # not SelectData: a forged request has no such event
        seed = data.get("index") if isinstance(data, dict) else None
        return to_components(page.pick(seed if seed in range(SAMPLES) else 0, session))

    pick.__annotations__["event"] = gr.EventData  # gradio looks here; a string would not resolve
    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    every = {**quiet, "trigger_mode": "multiple"}  # a second photo, or its refinement, while the first is at work
    latest = {**quiet, "trigger_mode": "always_last"}  # what the page shows is what is downloaded
    save = [plain(page.save), [session], [parts["download"]]]
    refine = [streaming(page.refine), [session, inputs["steps"]], outputs]

    upload = [photo, parts["points"], session]
    uploaded = photo.upload(streaming(page.upload), upload, outputs, **every)
    again = inputs["again"].click(plain(page.resume), [session], outputs, **quiet)
    for event in (uploaded.then(*refine, **every), again.then(*refine, **quiet)):
        event.then(*save, **latest)
    photo.clear(plain(page.replace), [session], outputs, **quiet)
    inputs["samples"].select(pick, [session], outputs, **every).then(*save, **latest)

    sliders = [parts[name] for name in page.names]
    layers = [inputs["first"], inputs["last"]]
    move = [session, *layers, *sliders]
    dragged = [slider.input for slider in sliders]  # also by a typed number, which has no release
    released = [slider.release for slider in (*sliders, *layers)]
    like = inputs["like"].click(streaming(page.take_expression), [session, inputs["reference"]], outputs, **quiet)
    for event in (
        gr.on(dragged, plain(page.move), move, outputs, **latest),
        gr.on(released, plain(page.move, rounds=ROUNDS), move, outputs, **latest),
        inputs["reset"].click(plain(page.reset), [session], outputs, **quiet),
        like,
    ):
        event.then(*save, **latest)
