r"""PriViLege: prompts that carry vision and language through a ViT whose first blocks are tuned, CVPR 2024.

Keon-Hee Park, Kyungwoo Song, Gyeong-Moon Park: "Pre-trained Vision and Language Transformers Are Few-Shot
Incremental Learners".

Two tokens beside the class token learn to see and to speak, and a base prompt modulated by the first blocks'
own features holds what the base session taught these blocks. Vision is kept apart from the class token by an
entropy-based divergence, language is taught by a language model's vectors of the class names.

    input      = [class token, v, l, patches]; logits = compare((f_cls + f_v) / 2, rows)
    block i    : one key and one value more, of b_K * conv(heads' outputs) and b_V * conv(mlp(norm2(.)))
    L_ED       = log(1 + (CE(P f_cls, y) + CE(P f_v, y)) / KL(softmax(P f_cls) || softmax(P f_v)))
                 P plain class means, the true class's logit 0 inside the KL
    L_SKD      = skd * (KL(softmax(w_y / T) || softmax(f_l / T)) + skd_labels * CE(P f_l, y)),   T = 2
    L          = CE(logits, y) + ed * L_ED + L_SKD in the base session, CE + L_SKD of v, l and rows later

Deviations: ``compare: cosine`` beside the published dot product; the loss sees the classes seen so far, not
those to come; P is of the pictures of a session's first epoch, generated ones joining with
``generated_weight``; the language model's vectors are mapped to the ViT's width where it differs; a later
session's epochs each start where it began (``tasks.learners.retrained``, which also says how shots are left
out). The released code's class names are out of step with the labels on CUB-200 and miniImageNet:
``class_names: as_released`` has CUB-200's order and cut, which is part of the published number; the default
has each label's own name.

Trains: the first blocks, all prompts and the rows in the base session, the two tokens and the rows later.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, linear, log_softmax, normalize, softmax

from tasks.classification.backbone import Backbone, BackboneSettings, load_backbone
from tasks.classification.tokens import (
    attended,
    embed,
    heads_of,
    insert,
    plain_vit,
    split_heads,
    through,
    with_prefix,
)
from tasks.classification.training import TrainingSettings, fit
from tasks.learners.base import Memory, Progress, TrainingData
from tasks.learners.finetune_proto import balanced
from tasks.learners.language import LanguageSettings, aligned_names, fitted, word_vectors
from tasks.learners.nc_fscil import shares
from tasks.learners.retrained import RetrainedLearner
from tasks.learners.sessions import seeded, take_weights, weights_of
from tasks.records import Frozen
from tasks.seeding import seed_for

LEAST_DIVERGENCE = 1e-6


class PrivilegeSettings(Frozen):
    """Prompts, losses and trainings.

    Attributes:
        kind: Chooses this learner.
        backbone: Pre-trained ViT.
        language: What reads the class names.
        class_names: ``correct``, or ``as_released`` (see the module).
        tuned_blocks: First blocks that take the base prompt and are trained in the base session.
        compare: Features with rows by the ``dot`` product, as published, or the ``cosine``.
        temperature: Factor of the cosine.
        generated_weight: Share of the generated pictures of a class in its mean, in [0, 1].
        prompt_range: Prompts and convolutions start uniformly within plus and minus this.
        ed: Weight of the divergence.
        skd: Weight of the distillation.
        skd_labels: Weight in it of the language token's own cross entropy.
        skd_temperature: Divisor of vectors before their softmax.
        base: Training of the base session.
        incremental: Training of later sessions.
    """

    kind: Literal["privilege"]
    backbone: BackboneSettings
    language: LanguageSettings
    class_names: Literal["correct", "as_released"]
    tuned_blocks: int = Field(ge=1)
    compare: Literal["dot", "cosine"]
    temperature: float = Field(gt=0)
    generated_weight: float = Field(ge=0, le=1)
    prompt_range: float = Field(gt=0)
    ed: float = Field(ge=0)
    skd: float = Field(ge=0)
    skd_labels: float = Field(ge=0)
    skd_temperature: float = Field(gt=0)
    base: TrainingSettings
    incremental: TrainingSettings


class BasePrompt(nn.Module):
    """One more key and one more value for each tuned block, modulated by the block's own features."""

    def __init__(self, blocks: int, tokens: int, heads: int, width: int) -> None:
        """Args: blocks: tuned ones. tokens: of the sequence. heads: of a block. width: of a token."""
        super().__init__()
        self.prompt = nn.Parameter(torch.zeros(blocks, 2, width))
        self.over_keys = nn.Parameter(torch.zeros(heads, tokens))
        self.over_values = nn.Parameter(torch.zeros(tokens))

    def prefix(self, index: int, block: Block, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value inputs [n, d] for tokens [n, t, d]; no gradient reaches the features that modulate them."""
        with torch.no_grad():
            heads = heads_of(cast(Any, block.attn), block.norm1(tokens), None, None)
            after = block.mlp(block.norm2(attended(block, tokens, None, None)))
        of_heads = torch.einsum("nhtw,ht->nhw", heads, self.over_keys).flatten(1)
        of_tokens = torch.einsum("ntd,t->nd", after, self.over_values)
        return self.prompt[index, 0] * of_heads, self.prompt[index, 1] * of_tokens

    def forward(self, index: int, block: Block, tokens: Tensor) -> Tensor:
        """The block over tokens [n, t, d] with the modulated prompt, which its own key and value weights project."""
        attention = cast(Any, block.attn)
        key, value = self.prefix(index, block, tokens)
        _, key_weight, value_weight = attention.qkv.weight.chunk(3)
        biases = attention.qkv.bias.chunk(3) if attention.qkv.bias is not None else (None, None, None)
        keys = split_heads(attention, linear(key[:, None], key_weight, biases[1]))
        values = split_heads(attention, linear(value[:, None], value_weight, biases[2]))
        return with_prefix(block, tokens, attention.k_norm(keys), values)


class Learned(nn.Module):
    """What sessions change: the two tokens [2, d], the classifier's rows and the plain means [n_classes, d]."""

    means: Tensor

    def __init__(self, n_classes: int, width: int) -> None:
        """All zero."""
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(2, width))
        self.rows = nn.Parameter(torch.zeros(n_classes, width))
        self.register_buffer("means", torch.zeros(n_classes, width))


class _Outputs(nn.Module):
    """Pictures to the three outputs [n, 3, d]: class token, vision, language."""

    def __init__(self, backbone: Backbone, learned: Learned, base: BasePrompt) -> None:
        super().__init__()
        self.backbone, self.learned, self.base = backbone, learned, base

    def forward(self, images: Tensor) -> Tensor:
        vit = plain_vit(self.backbone, "PriViLege")
        tuned = len(self.base.prompt)

        def call(index: int, block: Block, tokens: Tensor) -> Tensor:
            made: Tensor = self.base(index, block, tokens) if index < tuned else block(tokens)
            return made

        with self.backbone.computing(images.device):
            extra = self.learned.tokens.expand(len(images), -1, -1)
            return through(vit, insert(vit, embed(self.backbone, images), extra), call)[:, :3].float()


class Privilege(RetrainedLearner):
    """A ViT with base, vision and language prompts and a trained linear classifier."""

    kind: ClassVar[str] = "privilege"
    memory: ClassVar[Memory] = "prototypes"

    def __init__(
        self, settings: PrivilegeSettings, n_classes: int, device: torch.device, class_names: Sequence[str]
    ) -> None:
        """Load the backbone and the names' vectors; ``class_names`` by label.

        Raises:
            CheckpointError: There are no such weights.
            LanguageError: There is no such language model.
            ValueError: The backbone is no plain ViT with so many blocks, or there are not as many names as classes.
        """
        super().__init__(load_backbone(settings.backbone), n_classes, device)
        vit = cast(Any, plain_vit(self.backbone, "PriViLege"))
        if settings.tuned_blocks > len(vit.blocks):
            raise ValueError(
                f"tuned_blocks={settings.tuned_blocks}, but the ViT has {len(vit.blocks)} blocks"
            )
        if len(class_names) != n_classes:
            raise ValueError(f"PriViLege reads the name of each class: {n_classes}, got {len(class_names)}")
        self.settings = settings
        width = self.backbone.width
        names = aligned_names(class_names, settings.class_names)
        self.words = fitted(word_vectors(settings.language, names), width).to(device)
        tokens = vit.patch_embed.num_patches + vit.num_prefix_tokens + 2
        self.base_prompt = BasePrompt(settings.tuned_blocks, tokens, vit.blocks[0].attn.num_heads, width)
        self.base_prompt.to(device)
        self.tuned = vit.blocks[: settings.tuned_blocks]
        self.parts = Learned(n_classes, width)
        self._holds(self.parts)
        self.model = _Outputs(self.backbone, self.parts, self.base_prompt)

    # ------------------------------------------------------------------------------ learning

    def _open(self, data: TrainingData, seed: int) -> None:
        if not self.known:
            self._draw(seed_for(seed, "prompts"))
        self._open_again(data)

    def _open_again(self, data: TrainingData) -> None:
        """New classes' rows and plain means are the means of their pictures' plain features."""
        means, new = self._plain_means(data)
        self.parts.means[new] = means
        with torch.no_grad():
            self.parts.rows[new] = means

    def _draw(self, seed: int) -> None:
        limit = self.settings.prompt_range
        drawn = [self.parts.tokens, *self.base_prompt.parameters()]
        with seeded(seed), torch.no_grad():
            for parameter in drawn:
                parameter.copy_(torch.empty(parameter.shape).uniform_(-limit, limit))

    def _plain_means(self, data: TrainingData) -> tuple[Tensor, Tensor]:
        """Means [k, d] of the new classes that have pictures, and those classes [k]."""
        features = self.features(data.images)
        weights = shares(data.labels, data.is_generated, self.settings.generated_weight)
        new = torch.tensor([c for c in self.new if bool((data.labels == c).any())])
        member = (data.labels[None] == new[:, None]) * weights
        return (member @ features / member.sum(1, keepdim=True)).to(self.device), new

    def _train(self, data: TrainingData, seed: int, progress: Progress | None) -> list[float]:
        base = self.in_base_session
        self.backbone.requires_grad_(False).eval()
        self.base_prompt.requires_grad_(base)
        self.tuned.requires_grad_(base)
        seen, how = torch.tensor(self.seen), self.settings.base if base else self.settings.incremental
        columns = torch.searchsorted(seen, data.labels)

        def loss(outputs: Tensor, labels: Tensor) -> Tensor:
            return self._loss(outputs, labels, seen.to(outputs.device), base)

        losses = fit(
            nn.Identity(), self.model, data.images, columns, balanced(columns), how, seed, progress, loss
        )
        if base:
            means, new = self._plain_means(data)
            with torch.no_grad():
                self.parts.rows[new] = means
        return losses

    def _loss(self, outputs: Tensor, labels: Tensor, seen: Tensor, base: bool) -> Tensor:
        """Loss [n] of outputs [n, 3, d] and labels [n] that count ``seen``."""
        settings, (cls, vision, language) = self.settings, outputs.unbind(1)
        means, rows = self.parts.means[seen], self.parts.rows[seen]
        loss = cross_entropy(self._compare((cls + vision) / 2, rows), labels, reduction="none")
        spoken = distillation(
            language,
            self.words[seen][labels],
            self._compare(language, means),
            labels,
            settings.skd_temperature,
            settings.skd_labels,
        )
        loss = loss + settings.skd * spoken
        if base:
            loss = loss + settings.ed * entropy_divergence(
                self._compare(cls, means), self._compare(vision, means), labels
            )
        return loss

    def _compare(self, features: Tensor, rows: Tensor) -> Tensor:
        if self.settings.compare == "dot":
            return features @ rows.T
        return self.settings.temperature * normalize(features, dim=1) @ normalize(rows, dim=1).T

    def _logits(self, images: Tensor) -> Tensor:
        outputs = self.model(images)
        return self._compare((outputs[:, 0] + outputs[:, 1]) / 2, self.parts.rows)

    # ------------------------------------------------------------------------------ checkpoints

    def _tensors(self) -> dict[str, Tensor]:
        held = super()._tensors()
        means = held.pop("learned.means")
        return {
            **held,
            "prototypes": means,
            **weights_of("base_prompt", self.base_prompt),
            **weights_of("tuned", self.tuned),
        }

    def _take(self, tensors: dict[str, Tensor]) -> None:
        super()._take({**tensors, "learned.means": tensors["prototypes"]})
        take_weights("base_prompt", self.base_prompt, tensors)
        take_weights("tuned", self.tuned, tensors)


def entropy_divergence(plain: Tensor, vision: Tensor, labels: Tensor) -> Tensor:
    """L_ED, one number of a batch: logits [n, k] of class token and vision token, labels [n].

    Small where both know the class and differ in how they doubt the others.
    """
    known = cross_entropy(plain, labels) + cross_entropy(vision, labels)
    own = nn.functional.one_hot(labels, plain.shape[1]).bool()
    ours, theirs = (log_softmax(part.masked_fill(own, 0.0), 1) for part in (plain, vision))
    apart = kl_div(theirs, ours, reduction="batchmean", log_target=True).clamp(min=LEAST_DIVERGENCE)
    return torch.log1p(known / apart)


def distillation(
    spoken: Tensor, words: Tensor, logits: Tensor, labels: Tensor, temperature: float, label_weight: float
) -> Tensor:
    """L_SKD without its factor, [n]: the language token [n, d] against its class's word vector [n, d].

    Args:
        spoken: Output of the language token.
        words: Vector of each picture's class name.
        logits: Of the language token, [n, k].
        labels: [n].
        temperature: Divisor before each softmax over the d dimensions.
        label_weight: Weight of the logits' cross entropy.
    """
    taught, said = softmax(words / temperature, 1), log_softmax(spoken / temperature, 1)
    apart = kl_div(said, taught, reduction="none").sum(1)
    return apart + label_weight * cross_entropy(logits, labels, reduction="none")
