"""Where w starts: from a pSp encoder, or from saved latents."""

from collections.abc import Callable
from pathlib import Path

from common.cli import UsageError, UserError
from common.latents import load_latents
from common.weights import file_sha256


def parse_start(text: str, folder: Path | None = None) -> tuple[str, str]:
    """Kind and path of --init; folder: where the path's file lies if it is not where the path says."""
    kind, _, path = text.partition(":")
    if kind not in ("mean", "encoder", "latents") or (kind == "mean") == bool(path):
        raise UsageError(f"--init {text}: expected mean, encoder:PATH or latents:PATH")
    return kind, str(folder / Path(path).name) if folder and path else path


def open_start(kind: str, path: str, generator, space: str, names: list[str], *, load_encoder: Callable):
    """A function (positions, images [B, 3, S, S]) -> keywords of `project`, and what identifies it in the results.
    kind: mean, encoder or latents. load_encoder: pSp.psp.load_psp, which stands above this package."""
    if kind == "mean":
        return None, kind
    file = Path(path, "latents.npy") if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"--init: {file} does not exist")
    if kind == "latents":
        start = latents_start(path, generator, space, names)
    else:
        encoder = load_encoder(path, generator.token.device, generator)

        def start(positions, images):
            return {"w_start": encoder.encode(encoder.fit(images))}

    return start, f"{kind}:{file_sha256(file)[:16]}"


def latents_start(path: str, generator, space: str, names: list[str]) -> Callable:
    """Saved w, and noise maps if there are any, of the images called `names`."""
    saved = load_latents(
        path,
        expect_space={"w": ("w",), "w+": ("w", "w+"), "w++": ("w++",)}[space],
        expect_shape=(generator.config.n_tokens, generator.config.style_dim),
        expect_fingerprint=generator.fingerprint,
    )
    rows = {name: i for i, name in enumerate(saved.names)}
    missing = [name for name in names if name not in rows]
    if saved.fingerprint is not None and missing:
        more = f"(and {len(missing) - 1} more of {len(names)} images)"
        raise UserError(f"--init latents:{path} has no latent called {missing[0]} {more}")
    if saved.fingerprint is None and len(saved) not in (1, len(names)):
        raise UserError(f"--init latents:{path} holds {len(saved)} latents for {len(names)} images")

    def start(positions, images):
        chosen = [rows.get(names[position], position % len(saved)) for position in positions]
        noise = None if saved.noise is None else [layer[chosen] for layer in saved.noise]
        return {"w_start": saved.latents[chosen], "noise_start": noise}

    return start
