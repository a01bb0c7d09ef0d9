"""DualPrompt: general prompts for all sessions and one expert prompt for each, ECCV 2022.

Zifeng Wang, Zizhao Zhang, Sayna Ebrahimi, Ruoxi Sun, Han Zhang, Chen-Yu Lee, Xiaoqi Ren, Guolong Su, Vincent
Perot, Jennifer Dy, Tomas Pfister: "DualPrompt: Complementary Prompting for Rehearsal-free Continual
Learning".

Prompts are put in front of the keys and values of a frozen ViT's attention, queries stay. In the
``general_blocks`` they are the same for all sessions; in the ``expert_blocks`` each session trains its own,
which at test is found by the picture's plain feature: the session whose key is nearest.

    K, V of block i:  [p_K; K], [p_V; V]        expert of a picture at test = argmax_t cos(f(x), key_t)

Deviations: at test only sessions that have been are candidates. Each picture finds its own expert (a known
port reshapes a mixed batch so that keys and values of different pictures change places; here a test holds
them apart). The learning rate is annealed by a cosine within each epoch, gradients are not clipped, the term
of the keys is 1 - cos. ``head: prototype`` is not in the paper (see ``tasks.learners.l2p``). There is one
expert for each session, and a dataset with more sessions than ``pool`` is refused; the released code
silently goes on without.

Trains: the general prompts, the session's expert and key, and the rows of a linear head, in every session.
"""

from typing import ClassVar, Literal, cast

import torch
from pydantic import Field, model_validator
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import normalize

from tasks.classification.backbone import Backbone, load_backbone
from tasks.classification.tokens import embed, plain_vit, through, with_prefix
from tasks.learners.prompted import PromptedLinear, PromptedPrototypes, PromptedSettings, Prompts


class DualPromptSettings(PromptedSettings):
    """Where prompts go and how many experts there are.

    Attributes:
        kind: Chooses this learner.
        pool: Experts, at least one for each session, the base session among them.
        general_blocks: Blocks that take the general prompts, counted from 0.
        expert_blocks: Blocks that take the expert's.
        general_length: Pairs of keys and values of a general prompt in a block.
        expert_length: The same of an expert.

    Raises:
        ValueError: A block takes both.
    """

    kind: Literal["dualprompt"]
    pool: int = Field(ge=1)
    general_blocks: tuple[int, ...]
    expert_blocks: tuple[int, ...]
    general_length: int = Field(ge=1)
    expert_length: int = Field(ge=1)

    @model_validator(mode="after")
    def _apart(self) -> "DualPromptSettings":
        if both := set(self.general_blocks) & set(self.expert_blocks):
            raise ValueError(f"block {min(both)} is in general_blocks and in expert_blocks; name it in one")
        return self

    @property
    def max_sessions(self) -> int:
        """Sessions that the experts suffice for."""
        return self.pool


class Prefixes(Prompts):
    """General [blocks, 2, heads, length, w] and expert [pool, blocks, 2, heads, length, w] prompts; keys [pool, d]."""

    def __init__(self, settings: DualPromptSettings, backbone: Backbone) -> None:
        """All zero until drawn.

        Raises:
            ValueError: The backbone is no plain ViT, or has fewer blocks.
        """
        super().__init__(backbone)
        blocks = plain_vit(backbone, "DualPrompt").blocks
        for block in (*settings.general_blocks, *settings.expert_blocks):
            if not 0 <= block < len(blocks):
                raise ValueError(
                    f"DualPrompt's block {block} is not among the {len(blocks)} blocks of this classifier; "
                    f"set learner.general_blocks and learner.expert_blocks"
                )
        self.settings = settings
        attention = cast(Attention, blocks[0].attn)
        heads, width = attention.num_heads, attention.head_dim
        places, length = len(settings.general_blocks), settings.general_length
        self.general = nn.Parameter(torch.zeros(places, 2, heads, length, width))
        places, length = len(settings.expert_blocks), settings.expert_length
        self.experts = nn.Parameter(torch.zeros(settings.pool, places, 2, heads, length, width))
        self.keys = nn.Parameter(torch.zeros(settings.pool, self.width))

    @torch.no_grad()
    def open_session(self) -> None:
        """The new session's expert and key start at those of the one before.

        Raises:
            ValueError: There is no expert left.
        """
        now = int(self.session) + 1
        if now >= self.settings.pool:
            raise ValueError(
                f"session {now} has no expert in a pool of {self.settings.pool}; set learner.pool={now + 1} or more"
            )
        if now:
            self.experts[now], self.keys[now] = self.experts[now - 1].clone(), self.keys[now - 1].clone()
        super().open_session()

    def choose(self, query: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        """Each picture's expert [n] for queries [n, d], and the cosine of its key."""
        cosines = normalize(query, dim=1) @ normalize(self.keys, dim=1).T
        now = int(self.session)
        picked = cosines[:, : now + 1].argmax(1)
        if training:
            picked = torch.full_like(picked, now)
        return picked, cosines.gather(1, picked[:, None]).squeeze(1)

    def prefix(self, block: int, picked: Tensor) -> tuple[Tensor, Tensor] | None:
        """Keys and values [n, heads, l, w] that go to a block for pictures with experts [n]; None for no prompt."""
        if block in self.settings.general_blocks:
            keys, values = self.general[self.settings.general_blocks.index(block)]
            return keys.expand(len(picked), -1, -1, -1), values.expand(len(picked), -1, -1, -1)
        if block in self.settings.expert_blocks:
            own = self.experts[picked, self.settings.expert_blocks.index(block)]
            return own[:, 0], own[:, 1]
        return None

    def forward(self, backbone: Backbone, images: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        """See :meth:`Prompts.forward`."""
        with torch.no_grad():
            query = backbone(images)
        picked, cosines = self.choose(query, training)

        def call(index: int, block: Block, tokens: Tensor) -> Tensor:
            prefix = self.prefix(index, picked)
            return with_prefix(block, tokens, *prefix) if prefix else block(tokens)

        with backbone.computing(images.device):
            tokens = through(plain_vit(backbone, "DualPrompt"), embed(backbone, images), call)
        return tokens[:, 0].float(), 1 - cosines


class DualPromptLinear(PromptedLinear):
    """DualPrompt as published."""

    kind: ClassVar[str] = "dualprompt"


class DualPromptPrototypes(PromptedPrototypes):
    """DualPrompt with class means of the prompted feature."""

    kind: ClassVar[str] = "dualprompt"


def make_dualprompt(
    settings: DualPromptSettings, n_classes: int, device: torch.device
) -> DualPromptLinear | DualPromptPrototypes:
    """DualPrompt with the head that the settings name.

    Raises:
        CheckpointError: There are no such weights.
        ValueError: The backbone is no plain ViT, or has fewer blocks than are named.
    """
    backbone = load_backbone(settings.backbone)
    made = DualPromptLinear if settings.head == "linear" else DualPromptPrototypes
    return made(settings, backbone, Prefixes(settings, backbone), n_classes, device)
