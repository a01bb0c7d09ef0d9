"""What verbs read: sealed references become sessions, tensors, learners and generators.

Heavy objects are built once per process and reused by every stage and session.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tasks.classification.backbone import BackboneSettings, pretrained_digest
from tasks.context import EpochContext
from tasks.diffusion.checkpoint import weights_digest
from tasks.diffusion.generator import GeneratorSettings, StableDiffusion
from tasks.image_cache import MEBIBYTE, ImageCache
from tasks.images import refuse_changed
from tasks.learners.base import Learner, TrainingData
from tasks.learners.factory import LearnerSettings, make_learner
from tasks.learners.language import language_digest
from tasks.miniature.vlm_server import RULES
from tasks.records import ArtifactRef, AugmentedImage, Digest, ImageRef, Session, Usage
from tasks.store import Store, digest_of, read_lines
from tasks.vlm.client import ChatClient, VlmSettings
from tasks.vlm.factory import open_client
from tasks.vlm.images_api import ImagesApi, ImagesApiSettings
from tasks.vlm.transformers_client import model_digest

MINIATURE_CAPTIONER = Path(__file__).resolve().parent / "miniature" / "weights" / "captioner"

Drawer = StableDiffusion | ImagesApi
DrawerSettings = GeneratorSettings | ImagesApiSettings
"""Of what draws a set: a generator here, or a provider's model."""


def load_session(store: Store, ref: ArtifactRef) -> Session:
    """Read a sealed session."""
    return Session.model_validate_json(store.locate(ref).read_text(encoding="utf-8"))


def session_of(context: EpochContext) -> Session:
    """The context's session, which holds no test image."""
    return load_session(context.store, context.session_ref)


def original_paths(context: EpochContext, images: Sequence[ImageRef]) -> list[Path]:
    """Files of original images, each found to be what was recorded.

    Raises:
        UnreadableImageError: one is not.
    """
    return _unchanged(context.data_root, images)


def originals(context: EpochContext, images: Sequence[ImageRef], size: int | None = None) -> Tensor:
    """Original images as one tensor of pixels, uint8 [n, 3, size, size]."""
    return _images(context, images, [], size or context.dataset.size)


def augmented_images(context: EpochContext) -> list[AugmentedImage]:
    """The rows of A_k, empty if there is none."""
    augmentation = context.start.augmentation
    return read_lines(context.store.locate(augmentation.manifest), AugmentedImage) if augmentation else []


def augmented_paths(context: EpochContext, images: Sequence[AugmentedImage]) -> list[Path]:
    """Files of generated images of A_k, each found to be what was recorded.

    Raises:
        UnreadableImageError: one is not.
    """
    return _unchanged(_drawn(context), images)


def _drawn(context: EpochContext) -> Path:
    augmentation = context.start.augmentation
    assert augmentation is not None, "the epoch has no generated images"
    return context.store.locate(augmentation.images)


def _unchanged(root: Path, images: Sequence[ImageRef | AugmentedImage]) -> list[Path]:
    paths = [root / image.path for image in images]
    for path, image in zip(paths, images, strict=True):
        refuse_changed(path, image.digest)
    return paths


def augmented_tensors(
    context: EpochContext, images: Sequence[AugmentedImage], size: int | None = None
) -> Tensor:
    """Generated images as one tensor of pixels, uint8 [n, 3, size, size]."""
    return _images(context, [], images, size or context.dataset.size)


def drawn_tensors(context: EpochContext, folder: Path, images: Sequence[AugmentedImage]) -> Tensor:
    """Images of a set that is not sealed yet, as the classifier will see them: uint8 [n, 3, size, size]."""
    paths, digests = [folder / image.path for image in images], [image.digest for image in images]
    return image_cache(context.runtime.image_cache).load(paths, digests, context.dataset.size)


def _images(
    context: EpochContext, images: Sequence[ImageRef], generated: Sequence[AugmentedImage], size: int
) -> Tensor:
    paths = [context.data_root / image.path for image in images]
    if generated:
        folder = _drawn(context)
        paths += [folder / image.path for image in generated]
    digests = [image.digest for image in images] + [image.digest for image in generated]
    return image_cache(context.runtime.image_cache).load(paths, digests, size)


@lru_cache(maxsize=1)
def image_cache(mebibytes: int) -> ImageCache:
    """What this process remembers of pictures."""
    return ImageCache(mebibytes * MEBIBYTE)


def training_data(context: EpochContext, session: Session) -> TrainingData:
    """The session's originals, then A_k."""
    generated = augmented_images(context)
    images = _images(context, session.train, generated, context.dataset.size)
    labels = [image.label for image in session.train] + [image.label for image in generated]
    is_generated = torch.arange(len(labels)) >= len(session.train)
    return TrainingData(images=images, labels=torch.tensor(labels), is_generated=is_generated)


def learner_for(
    context: EpochContext, learner: LearnerSettings, classifier: ArtifactRef | None = None
) -> Learner:
    """A learner with the given weights, or those the epoch starts from, or the pre-trained ones."""
    context.runtime.apply()
    names = context.class_names
    model = make_learner(learner, len(names), context.runtime.torch_device, names)
    if (weights := classifier or context.start.classifier) is not None:
        model.load(context.store.locate(weights))
    return model


def learner_identity(
    learner: LearnerSettings, training: Literal["base", "incremental"] | None
) -> dict[str, object]:
    """What of the learner's settings changes its result, given which of its trainings it does, if any.

    The path of the pre-trained weights does not, nor how another session trains: so a change of
    ``learner.incremental`` leaves the base session sealed as it is.
    """
    apart = {"backbone": {"checkpoint", "checkpointing"}, "language": {"model", "tokenizer"}}
    settings = learner.model_dump(exclude=apart)
    return {k: v for k, v in settings.items() if k not in {"base", "incremental"} - {training}}


def names_read(context: EpochContext, learner: LearnerSettings) -> dict[str, Digest]:
    """What training reads of class names: they and the language model's content, where the learner has one."""
    language = getattr(learner, "language", None)
    if language is None:
        return {}
    return {"class_names": Digest("\n".join(context.class_names)), "language": language_digest(language)}


@lru_cache(maxsize=4)
def backbone_digest(backbone: BackboneSettings) -> Digest:
    """The content id of the pre-trained weights: of the local checkpoint, or of the published file."""
    return pretrained_digest(backbone)


_generators: dict[tuple[GeneratorSettings, str, int], StableDiffusion] = {}


def _generator(settings: GeneratorSettings, device: str, hand: int) -> StableDiffusion:
    for other in [key for key in _generators if key[:2] != (settings, device)]:
        del _generators[other]  # one kind at a time: it may be large
    if (settings, device, hand) not in _generators:
        _generators[settings, device, hand] = StableDiffusion.from_settings(settings, torch.device(device))
    return _generators[settings, device, hand]


def generator_for(
    context: EpochContext, settings: GeneratorSettings, adapter: ArtifactRef | None, hand: int = 0
) -> StableDiffusion:
    """The generator with an adapter attached, or with none; of several that work at the same time each is a hand's."""
    context.runtime.apply()
    generator = _generator(settings, str(context.runtime.torch_device), hand)
    generator.use_adapter(context.store.locate(adapter) if adapter else None)
    return generator


@lru_cache(maxsize=4)
def generator_digest(settings: DrawerSettings) -> Digest:
    """The content id of the base generator's weights; of a provider's model, its name."""
    if isinstance(settings, ImagesApiSettings):
        return settings.digest
    return weights_digest(settings.source)


def drawer_for(
    context: EpochContext, settings: DrawerSettings, adapter: ArtifactRef | None, hand: int = 0
) -> Drawer:
    """What draws the set: the generator, or a provider behind the state's images and the run's account."""
    if isinstance(settings, GeneratorSettings):
        return generator_for(context, settings, adapter, hand)
    state = context.runtime.state
    paid = state / "runs" / context.run / "images-paid.jsonl"
    return ImagesApi(settings, cache=state / "images_api", ledger=paid)


def redraws(settings: DrawerSettings) -> bool:
    """Whether each epoch draws other images; a provider's may serve all epochs."""
    return not isinstance(settings, ImagesApiSettings) or settings.every_epoch


def price_of(context: EpochContext, settings: DrawerSettings, images: Sequence[AugmentedImage]) -> Usage:
    """What a provider was asked for to draw these; images that the set before had too were paid for there."""
    if isinstance(settings, GeneratorSettings):
        return Usage()
    had = {(image.prompt, image.seed) for image in augmented_images(context)}
    new = [image for image in images if (image.prompt, image.seed) not in had]
    drawer = ImagesApi(settings, cache=context.runtime.state / "images_api")
    return drawer.usage_of([image.prompt for image in new], [image.seed for image in new])


def vlm_for(context: EpochContext, settings: VlmSettings, vlm_url: str | None) -> ChatClient:
    """The VLM, behind the state's answers, with the run's account of what it paid."""
    state = context.runtime.state
    return open_client(
        settings,
        base_url=vlm_url,
        cache=state / "vlm",
        ledger=state / "runs" / context.run / "vlm-paid.jsonl",
        device=context.runtime.torch_device,
    )


@lru_cache(maxsize=4)
def vlm_digest(settings: VlmSettings) -> Digest | None:
    """The content id of the VLM's weights, and of its rules, where they are at hand; a provider's model is its name."""
    if settings.kind == "transformers":
        return model_digest(settings)
    if settings.kind == "miniature" and settings.base_url is None:
        return Digest(f"{digest_of(MINIATURE_CAPTIONER)}-{RULES}")
    return None


def generator_identity(settings: DrawerSettings) -> dict[str, object]:
    """What of the generator's settings changes its images; where it is does not, the batch shape does."""
    if isinstance(settings, ImagesApiSettings):
        return settings.identity
    return settings.model_dump(exclude={"path", "revision", "variant", "config"})
