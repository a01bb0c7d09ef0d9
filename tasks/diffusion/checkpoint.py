"""Opening a generator: whatever ``generator.path`` names becomes the parts of a Stable Diffusion pipeline.

    <folder>             a pipeline in diffusers' format; of files in several variants (``*.fp16.safetensors``) the
                         plain ones, or those of ``variant``
    <file>.safetensors   a whole checkpoint in the original layout. It holds neither tokenizer nor noise schedule:
                         ``config`` names a folder that does, in diffusers' format, with or without weights
    owner/name           a pipeline on a hub, at ``revision``

The families 1.x and 2.x are read, noise- and velocity-predicting ones alike (the noise schedule's
``prediction_type`` says which). SDXL has two text encoders and is told the picture's size, which neither
sampling nor tuning here knows; it is refused, as are inpainting, upscaling and distilled models. Of weights only
safetensors are read, of any precision.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from tasks.hub import hub_file
from tasks.records import Digest, Frozen
from tasks.store import digest_of, fingerprint

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

INDEX = "model_index.json"
KIND = "StableDiffusionPipeline"
FAMILIES = "generators of the Stable Diffusion 1.x and 2.x families are supported"
_UNET, _SDXL = "model.diffusion_model.", "conditioner.embedders."
_OUTSIDE = ("class_embed_type", "num_class_embeds", "addition_embed_type", "time_cond_proj_dim")


class Source(Frozen):
    """Where a generator's weights are; see the module."""

    path: str
    revision: str | None = None
    variant: str | None = None
    config: str | None = None

    @property
    def kind(self) -> str:
        """``folder``, ``file`` or ``hub``.

        Raises:
            ValueError: it is none of the three; the message says what is missing.
        """
        path = Path(self.path)
        if path.is_dir():
            if not (path / INDEX).is_file():
                raise ValueError(
                    f"generator.path={self.path!r} holds no {INDEX}; give a pipeline's own folder"
                )
            return "folder"
        if path.is_file():
            if path.suffix != ".safetensors":
                raise ValueError(
                    f"generator.path={self.path!r} is no .safetensors file; convert it, other formats can run code"
                )
            return "file"
        if self.path.count("/") != 1 or self.path.startswith((".", "/")) or path.suffix == ".safetensors":
            raise ValueError(
                f"generator.path={self.path!r} does not exist; "
                f"give a pipeline's folder, a .safetensors file or a hub's owner/name"
            )
        return "hub"


def weights_digest(source: Source) -> Digest:
    """The content id of a generator: of its folder's files, of its file and ``config``, or a hub's commit.

    Raises:
        ValueError: there is no generator, or one of another family; found before any weight is read.
    """
    described = _checked(source)
    if source.kind == "hub":
        return Digest(f"hub:{source.path}@{described.parent.name}")
    digest = digest_of(Path(source.path))
    if source.kind == "folder" or source.config is None:
        return digest
    return Digest(f"{digest}+{_config_digest(Path(source.config))}")


def open_pipeline(source: Source, dtype: torch.dtype) -> "StableDiffusionPipeline":
    """Read all parts, in ``dtype``, on the CPU, without a safety checker.

    Raises:
        ValueError: nothing there, another family, weights that are missing or do not fit.
    """
    described = _checked(source)
    try:
        with _no_progress_bars():
            read = _read_file if source.kind == "file" else _read_format
            pipeline = read(source, described, dtype)
    except Exception as error:  # of diffusers, transformers, safetensors or a hub's transport
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        remedy = ""
        if source.kind == "file" and source.config is None:
            remedy = "; the file holds weights only: give a folder with tokenizer and schedule by generator.config="
        raise ValueError(f"cannot load generator.path={source.path!r}: {first}{remedy}") from error
    _refuse_model(source, pipeline)
    return pipeline


def _read_format(source: Source, index: Path, dtype: torch.dtype) -> "StableDiffusionPipeline":
    from diffusers import StableDiffusionPipeline

    folder = source.kind == "folder"
    return StableDiffusionPipeline.from_pretrained(
        source.path,
        revision=None if folder else index.parent.name,
        variant=source.variant or (_only_variant(index.parent) if folder else None),
        dtype=dtype,
        use_safetensors=True,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _read_file(source: Source, path: Path, dtype: torch.dtype) -> "StableDiffusionPipeline":
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_single_file(
        str(path),
        config=source.config,
        local_files_only=source.config is not None,
        dtype=dtype,
        safety_checker=None,
        feature_extractor=None,
    )


def _checked(source: Source) -> Path:
    """What describes the generator, its index or its file, once it is known to be of a family that is read."""
    path, kind = Path(source.path), source.kind
    if kind != "file":
        index = _hub_index(source) if kind == "hub" else path / INDEX
        _refuse_kind(source, index)
        return index
    _refuse_layout(source)
    if source.config is not None and not (Path(source.config) / INDEX).is_file():
        raise ValueError(f"generator.config={source.config!r} holds no {INDEX}; give a pipeline's folder")
    return path


def _hub_index(source: Source) -> Path:
    remedy = "run once where there is a network, or give a folder or a .safetensors file that you have by generator.path="
    return hub_file(source.path, INDEX, source.revision, remedy)


def _only_variant(folder: Path) -> str | None:
    """The variant of a folder that has no plain weights, else None."""
    stem, names = "diffusion_pytorch_model", {file.name for file in (folder / "unet").glob("*.safetensors")}
    if any(name.removeprefix(stem).startswith((".safetensors", "-")) for name in names):
        return None
    found = sorted({name.removeprefix(f"{stem}.").split(".")[0].split("-")[0] for name in names})
    return found[0] if found else None


def _config_digest(folder: Path) -> Digest:
    """Of the texts below a folder: its configurations and its tokenizer, whatever weights are beside them."""
    texts = (file for kind in ("*.json", "*.txt") for file in folder.rglob(kind))
    listing = {file.relative_to(folder).as_posix(): digest_of(file) for file in texts}
    return Digest(fingerprint("generator.config", 1, {}, listing, 0)[:32])


# ---------------------------------------------------------------------------------------- what is refused


def _refuse_kind(source: Source, index: Path) -> None:
    try:
        kind = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{index} does not describe a pipeline: {error}; fetch the folder anew") from error
    if kind != KIND:
        raise ValueError(f"generator.path={source.path!r} is a {kind}; {FAMILIES} ({KIND})")


def _refuse_layout(source: Source) -> None:
    try:
        with safe_open(source.path, "pt") as file:
            keys = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"cannot read generator.path={source.path!r}: {error}; fetch the file anew"
        ) from error
    if any(key.startswith(_SDXL) for key in keys):
        raise ValueError(f"generator.path={source.path!r} is a checkpoint of SDXL; {FAMILIES}")
    if not any(key.startswith(_UNET) for key in keys):
        raise ValueError(
            f"generator.path={source.path!r} is no whole checkpoint: no weight begins with {_UNET!r}; "
            f"{FAMILIES}, with text encoder and autoencoder in the file"
        )


def _refuse_model(source: Source, pipeline: "StableDiffusionPipeline") -> None:
    unet, latent = pipeline.unet.config, pipeline.vae.config.latent_channels
    if unet.in_channels != latent:
        raise ValueError(
            f"generator.path={source.path!r} takes {unet.in_channels} channels of {latent} that the autoencoder has: "
            f"it paints into pictures; {FAMILIES} that draw from text alone"
        )
    if wanted := [name for name in _OUTSIDE if unet.get(name) is not None]:
        raise ValueError(f"generator.path={source.path!r} wants more than a text ({wanted[0]}); {FAMILIES}")


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Loading is quiet; whoever wants progress shows it by the image."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown = [
        library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()
    ]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
