"""The captioner at work: pictures in, readings out. What it says is learned; parsing its sentence is a rule."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from transformers import CLIPTokenizer, VisionEncoderDecoderModel

from tasks.miniature import architecture  # noqa: F401  (registers the encoder with transformers)
from tasks.miniature.captions import ATTRIBUTES, Attributes, caption, parse_caption

UNKNOWN = "unknown"
LONGEST = 30


@dataclass(frozen=True)
class Reading:
    """What the captioner saw; ``"unknown"`` for an attribute that its sentence left out."""

    category: str
    form: str
    style: str
    weight: str
    pose: str
    colour: str
    background: str

    @classmethod
    def of(cls, attributes: Attributes) -> Self:
        """Reading of parsed attributes."""
        return cls(**{name: getattr(attributes, name) or UNKNOWN for name in ATTRIBUTES})

    @property
    def attributes(self) -> Attributes:
        """The attributes read, None where unknown."""
        return Attributes(**{n: None if (v := getattr(self, n)) == UNKNOWN else v for n in ATTRIBUTES})

    def caption(self) -> str:
        """The reading as a full caption of the corpus's first grammar."""
        if self.category == UNKNOWN:
            return "A picture"
        return caption(self.attributes)


class Reader:
    """Reads pictures. Deterministic: greedy decoding."""

    def __init__(self, model: VisionEncoderDecoderModel, tokenizer: CLIPTokenizer) -> None:
        """Wrap a trained model and its words."""
        self.model, self.tokenizer = model.eval(), tokenizer

    @classmethod
    def from_weights(cls, folder: str | Path) -> Self:
        """Load ``weights/captioner``.

        Raises:
            ValueError: the folder holds no captioner.
        """
        if not (Path(folder) / "model.safetensors").exists():
            raise ValueError(f"no captioner in {str(folder)!r}; run: python -m tasks.miniature.pretrain")
        model = VisionEncoderDecoderModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        return cls(model, CLIPTokenizer.from_pretrained(folder))

    @torch.no_grad()
    def describe(self, images: Tensor, batch: int = 64) -> list[str]:
        """Sentences for images [n, 3, 32, 32] in [0, 1].

        Raises:
            ValueError: another shape, or values outside of [0, 1].
        """
        if images.ndim != 4 or images.shape[1:] != (3, 32, 32):
            raise ValueError(f"images must be [n, 3, 32, 32], got {list(images.shape)}; resize them first")
        if len(images) and (images.min() < 0 or images.max() > 1):
            raise ValueError(f"values must lie in [0, 1], got {images.min():.3g} to {images.max():.3g}")
        texts: list[str] = []
        for part in images.float().split(batch):
            ids = self.model.generate(
                pixel_values=part * 2 - 1, max_length=LONGEST, do_sample=False, num_beams=1
            )
            texts += self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return texts

    def read(self, images: Tensor) -> list[Reading]:
        """Readings of images [n, 3, 32, 32] in [0, 1]."""
        return [
            Reading.of(parse_caption(text.replace("sans - serif", "sans-serif")))
            for text in self.describe(images)
        ]
