"""The projector in the background of the demo page: progress to look at, and it can be called off.

refinement = Refinement(tools, face, steps=200)
while refinement.running: print(refinement.step, refinement.loss); time.sleep(0.3)
face = refinement.result                            # None when it was cancelled; .error says what went wrong
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from dataclasses import replace

import numpy as np
import torch

from common.images import fit_image, to_uint8
from demo_app.session import Face, SessionError, Tools
from inversion.inputs import pixel_seed
from inversion.projector import project

MOST_STEPS = 1000
LR_RATIO = 0.01  # step size of Adam in deviations of the codes: what served W++ best of those tried (docs/results.md)
SHOW_EVERY = 5  # steps between two pictures of the progress


def refine_settings(tools: Tools, steps: int) -> dict:
    """Keywords of `project`: projector.py --mse 1 --noise 0 --lr ... . SessionError for too many steps."""
    if not 1 <= steps <= MOST_STEPS:
        raise SessionError(f"{steps} steps: expected 1 to {MOST_STEPS}")
    lr = float(f"{LR_RATIO * float(tools.std.mean()):.2g}")
    return {"steps": int(steps), "lr": lr, "mse": 1.0, "noise": 0.0}


class Cancelled(Exception):
    """Raised inside the optimisation."""


class Background(ABC):
    """A thread that projects one face. step of steps, loss and picture (uint8 [size, size, 3]) tell how far it is;
    result is None while it works and when it was cancelled, error says what went wrong. What it does is _project."""

    def __init__(self, settings: dict):
        self.settings = settings
        self.step, self.loss = 0, float("nan")
        self.picture: np.ndarray | None = None
        self.result = None
        self.error: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @abstractmethod
    def _project(self):
        """The result. Calls self._watch after each step, which raises Cancelled."""

    @property
    def steps(self) -> int:
        return self.settings["steps"]

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    @property
    def cancelled(self) -> bool:
        return self._stop.is_set()

    def cancel(self) -> None:
        self._stop.set()

    def join(self, timeout: float | None = None) -> None:
        self._thread.join(timeout)

    def _run(self) -> None:
        try:
            self.result = self._project()
        except Cancelled:
            pass
        except (ValueError, RuntimeError) as error:  # RuntimeError: out of memory
            self.error = f"refining failed: {str(error).splitlines()[0]}"

    def _watch(self, step, active, images, losses) -> None:
        if self._stop.is_set():
            raise Cancelled
        self.step, self.loss = step + 1, float(losses[0])
        if step % SHOW_EVERY == 0:
            self.picture = to_uint8(images[0])


def target_picture(face: Face, size: int) -> torch.Tensor:
    """The aligned face as the projector takes it, uint8 [3, size, size]."""
    return torch.from_numpy(np.array(fit_image(face.crop, size))).permute(2, 0, 1).contiguous()


class Refinement(Background):
    """Begins at the encoder's code (or the mean code): what projector.py gives. result: a Face.

    Raises SessionError when it cannot be.
    """

    def __init__(self, tools: Tools, face: Face, steps: int):
        if face.method == "drawn":
            raise SessionError("this face was drawn by the generator: its code is exact already")
        if tools.perceptual is None:
            raise SessionError("refining needs a perceptual network, and no weights for one were found")
        self.tools, self.face = tools, face
        super().__init__(refine_settings(tools, steps))

    def _project(self) -> Face:
        tools, face = self.tools, self.face
        picture = target_picture(face, tools.size)
        image, start = picture.float() / 127.5 - 1, None
        if tools.encoder is not None:
            with torch.no_grad():
                start = tools.encoder.encode(tools.encoder.fit(image[None].to(tools.mean)))
        found = project(
            tools.generator,
            image[None],
            perceptual=tools.perceptual,
            space=tools.space,
            w_start=start,
            statistics=(tools.mean, tools.std),
            seeds=[pixel_seed(picture, 0)],
            callback=self._watch,
            **self.settings,
        )
        if not torch.isfinite(found.latents).all():
            raise ValueError("the optimisation diverged")
        return replace(
            face, code=found.latents[0].numpy(), noise=found.noise, method="projector", steps=int(found.steps[0])
        )
