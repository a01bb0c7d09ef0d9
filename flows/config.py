"""ExperimentConfig: the settings that each noun owns, gathered; composed by Hydra, then frozen.

Hydra composes once, at the start of an experiment, from ``configs/``; pydantic validates. After that
only frozen models are passed. YAML holds the values: nothing here has a default.
"""

import difflib
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pydantic import Field, ValidationError, model_validator

from flows.convergence import StoppingSettings
from tasks.augmentation import AugmenterSettings
from tasks.classification.backbone import BackboneSettings
from tasks.datasets.benchmark import DatasetSettings
from tasks.datasets.settings import NAME
from tasks.diffusion.generator import GeneratorSettings
from tasks.diffusion.swaps import SwapSettings
from tasks.diffusion.tuning import TuningSettings
from tasks.learners.factory import LearnerSettings
from tasks.records import Frozen
from tasks.runtime import RuntimeSettings
from tasks.secrets import named_so, refuse_in_overrides, refuse_in_settings
from tasks.settings import added_later
from tasks.similarity.selection import MiningSettings
from tasks.store import read_json
from tasks.tracking_runs import TrackingSettings
from tasks.vlm.client import VlmSettings
from tasks.vlm.images_api import ImagesApiSettings
from tasks.vlm.transport import PACING
from tasks.vlm.zero_shot import ZeroShotSettings

PROJECT = Path(__file__).resolve().parent.parent
CONFIGS = PROJECT / "configs"

PLACES = {
    "dataset.root": ("dataset.root",),
    "dataset.splits": ("dataset.splits",),
    "generator.path": ("generator.path",),
    "classifier.checkpoint": ("classifier.checkpoint", "learner.backbone.checkpoint"),
}
"""Settings that say where data and weights are, and which fields each sets."""

_COMPOSING = threading.Lock()  # Hydra's global state is not thread-safe


class ConfigError(ValueError):
    """A setting is wrong; the message names it and what would be right."""


class ExperimentConfig(Frozen):
    """One dataset, method and seed.

    Raises:
        ValueError: images would be drawn for a VLM that classifies and learns nothing.
    """

    method: str = Field(pattern=NAME)
    seed: int = Field(ge=0)
    dataset: DatasetSettings
    classifier: BackboneSettings
    learner: Annotated[LearnerSettings | ZeroShotSettings, Field(discriminator="kind")]
    augmenter: AugmenterSettings
    generator: GeneratorSettings
    images_api: ImagesApiSettings | None = added_later(None)
    vlm: VlmSettings
    mining: MiningSettings
    tuning: TuningSettings
    stopping: StoppingSettings
    runtime: RuntimeSettings
    tracking: TrackingSettings

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.zero_shot and self.augmenter.draws:
            raise ValueError("learner=vlm_zero_shot learns nothing from images: use augmenter=none with it")
        if self.augmenter.source == "images_api" and self.images_api is None:
            raise ValueError("augmenter.source=images_api needs to know whose images: add images_api=openai")
        return self

    @property
    def drawer(self) -> GeneratorSettings | ImagesApiSettings:
        """What draws the images, where any are drawn."""
        return (
            self.images_api if self.augmenter.source == "images_api" and self.images_api else self.generator
        )

    @property
    def zero_shot(self) -> bool:
        """Whether the VLM itself classifies and nothing is trained."""
        return isinstance(self.learner, ZeroShotSettings)

    @property
    def trained(self) -> LearnerSettings:
        """The learner's settings, where there is one that learns."""
        assert not isinstance(self.learner, ZeroShotSettings), "asked for only where zero_shot is not"
        return self.learner

    @property
    def asks_vlm(self) -> bool:
        """Whether the run needs a VLM at all."""
        return self.zero_shot or self.augmenter.asks_vlm

    @property
    def run_key(self) -> str:
        """``<dataset>/<method>/seed-<n>``: the run's name and its folder below runtime.runs."""
        return f"{self.dataset.name}/{self.method}/seed-{self.seed}"

    @property
    def tags(self) -> tuple[str, str, str]:
        """``dataset:<name>``, ``method:<name>``, ``seed:<n>``: what its flow runs are found by in Prefect."""
        return (f"dataset:{self.dataset.name}", f"method:{self.method}", f"seed:{self.seed}")

    @property
    def identity(self) -> dict[str, Any]:
        """What makes a result: everything but where and how it runs and who watches."""
        return identity_of(self.model_dump(mode="json"))


class WindowsConfig(Frozen):
    """What ``fscil windows`` reads: which generator draws, which prompts are swapped, and where it runs."""

    generator: GeneratorSettings
    windows: SwapSettings
    runtime: RuntimeSettings


Settings = TypeVar("Settings", bound=Frozen)
T = TypeVar("T")


def identity_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of dumped settings that makes a result; how fast and at what price a provider is asked is not."""
    kept = {key: value for key, value in config.items() if key not in ("runtime", "tracking")}
    for group in ("vlm", "images_api"):
        if isinstance(asked := config.get(group), Mapping):
            kept[group] = {key: value for key, value in asked.items() if key not in PACING}
    return kept


def load_config(overrides: Sequence[str]) -> ExperimentConfig:
    """Compose and validate one experiment's settings.

    Args:
        overrides: Hydra overrides such as ``dataset=digits``, ``method=guided``, ``tuning.updates=20``.

    Raises:
        ConfigError: an unknown group, choice or key, or a value of the wrong type; the message names it.
    """
    return _composed("config", ExperimentConfig, overrides)


def load_windows(overrides: Sequence[str]) -> WindowsConfig:
    """Compose and validate the settings of ``fscil windows``. Raises ConfigError as :func:`load_config`."""
    return _composed("windows", WindowsConfig, overrides)


def stored_config(folder: Path) -> ExperimentConfig:
    """The settings that a run's folder, or one below it, was written with; where and how to run are today's.

    Raises:
        ConfigError: no config.json there or above, or one of another version.
    """
    for parent in (folder.resolve(), *folder.resolve().parents):
        if (file := parent / "config.json").is_file():
            here, stored = load_config(["images_api=openai"]).model_dump(), read_json(file)
            today = {key: here[key] for key in ("runtime", "tracking")}
            for group in ("vlm", "images_api"):
                if isinstance(asked := stored.get(group), Mapping):
                    today[group] = {**here[group], **asked}
            try:
                return _validated(ExperimentConfig, {**stored, **today})
            except ConfigError as error:
                raise ConfigError(
                    f"{file} was written by another version ({error}); move its run folder away and run it again"
                ) from error
    raise ConfigError(
        f"no config.json in or above {folder}; give a folder below runs/<dataset>/<method>/seed-<n>"
    )


def config_here(folder: Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """The settings that a run was made with, and where its data and weights are on this machine.

    Args:
        folder: a run's folder or one below it.
        overrides: ``runtime.``, ``tracking.`` and :data:`PLACES` alone, such as ``dataset.root=data/digits``. Without
            one, data that are not where they were are looked for where this checkout has them.

    Raises:
        ConfigError: as :func:`stored_config`, or an override of something else.
    """
    config = stored_config(folder)
    refuse_keys(overrides)
    ours = [override for override in overrides if override.startswith(("runtime", "tracking"))]
    today, values = load_config(ours), config.model_dump()
    values |= {"runtime": today.runtime.model_dump(), "tracking": today.tracking.model_dump()}
    if not config.dataset.root.is_dir() and config.dataset.name in choices("dataset"):
        usual = load_config([f"dataset={config.dataset.name}"]).dataset
        values["dataset"] |= {
            name: getattr(usual, name) for name in ("root", "splits") if name in values["dataset"]
        }
    for override in overrides:
        name, _, value = override.partition("=")
        if override in ours:
            continue
        if name not in PLACES:
            raise ConfigError(
                f"{override!r} would change what was recorded; only runtime., tracking. and {', '.join(PLACES)} "
                "may differ on another machine"
            )
        for group in PLACES[name]:
            part = values
            for key in group.split(".")[:-1]:
                part = part[key]
            part[group.rpartition(".")[2]] = value
    return _validated(ExperimentConfig, values)


def _composed(primary: str, model: type[Settings], overrides: Sequence[str]) -> Settings:
    refuse_keys(overrides)
    try:
        with _COMPOSING, initialize_config_dir(str(CONFIGS), version_base="1.3"):
            found = compose(primary, overrides=list(overrides))
            written = OmegaConf.to_container(found, resolve=False)
            composed = OmegaConf.to_container(found, resolve=True)
    except Exception as error:  # Hydra raises errors of any kind, asserts among them, for what it cannot read
        raise ConfigError(_hydra_sentence(error, overrides, model)) from error
    assert isinstance(composed, dict), "the primary config is a mapping"
    _without_keys(
        refuse_in_settings, {"": written}
    )  # the value of an interpolated key may look like anything
    return _validated(model, composed)


def refuse_keys(overrides: Sequence[str]) -> None:
    """Refuse overrides that hold a key: before they become parameters of a flow run, which Prefect keeps.

    Raises:
        ConfigError: one does; the message names the setting and not the value.
    """
    _without_keys(refuse_in_overrides, overrides)


def _without_keys(refuse: Callable[[T], None], given: T) -> None:
    try:
        refuse(given)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _validated(model: type[Settings], values: Mapping[Any, Any]) -> Settings:
    _without_keys(refuse_in_settings, values)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_pydantic_sentence(error)) from None  # its own text repeats every value given


def choices(group: str) -> list[str]:
    """The names that a config group offers."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Which settings changed between two configs, as ``name: old -> new``."""
    changed = []
    for key in sorted({*old, *new}):
        a, b, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            changed += differences(a, b, f"{name}.")
        elif a != b:
            changed.append(f"{name}: {a!r} -> {b!r}")
    return changed


def _hydra_sentence(error: Exception, overrides: Sequence[str], model: type[Frozen]) -> str:
    text = " ".join(str(error).split())
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if (CONFIGS / key).is_dir() and value not in choices(key):
            return f"{key}={value} is unknown; {key} is one of: {', '.join(choices(key))}"
        if f"'{key}'" in text or key in text:
            return f"override {override!r} does not fit the configuration{_nearest(key, model)}. {text}"
    return text


def _nearest(key: str, model: type[Frozen]) -> str:
    known = [name for name in _all_keys(model) if "." in name or "=" not in name]
    near = difflib.get_close_matches(key, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _all_keys(model: type[Frozen], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Frozen):
            keys += _all_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _pydantic_sentence(error: ValidationError) -> str:
    parts = []
    for item in error.errors(include_url=False):
        name = ".".join(str(step) for step in item["loc"])
        given = (
            ""
            if item["type"] == "missing" or isinstance(item["input"], Mapping) or named_so(name)
            else f" (got {item['input']!r})"
        )
        parts.append(f"{name}: {item['msg']}{given}" if name else item["msg"])
    return "; ".join(parts)
