"""L2P: a pool of prompts, of which each picture draws its own, CVPR 2022.

Zifeng Wang, Zizhao Zhang, Chen-Yu Lee, Han Zhang, Ruoxi Sun, Xiaoqi Ren, Guolong Su, Vincent Perot, Jennifer
Dy, Tomas Pfister: "Learning to Prompt for Continual Learning".

A frozen ViT reads learned tokens beside the picture's. Which ones of a pool they are, the picture itself
decides: its plain feature is compared with the prompts' keys, and the ``chosen`` nearest join.

    query = f(x)                       i_1 .. i_N = the N prompts of largest cos(query, key_i)
    input = [class token, P_i1 .. P_iN, patches]          feature = mean of the prompts' outputs

Deviations: each picture chooses for itself, in training and at test. The released ports let a vote of the
whole batch choose, at test too, where class-sorted batches give the class away; ``selection: vote`` does as
they do, and then results depend on the batch. The learning rate is annealed by a cosine within each epoch,
gradients are not clipped, and the term of the keys is 1 - cos, of the same gradient. ``head: prototype`` is
not in the paper; in few-shot sessions its linear head with ``mask: session`` learns almost no new class
(``l2p_as_published``). The recommended settings read the class token and start
prompts small and few, fewer than a small network has patches: chosen on digits_dev.

Trains: the pool's prompts and keys, and the rows of a linear head, in every session.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot

from tasks.classification.backbone import Backbone, load_backbone
from tasks.classification.tokens import embed, insert, plain_vit, through
from tasks.learners.prompted import PromptedLinear, PromptedPrototypes, PromptedSettings, Prompts


class L2pSettings(PromptedSettings):
    """The pool.

    Attributes:
        kind: Chooses this learner.
        pool: Prompts in all.
        chosen: Prompts that a picture draws, at most the pool.
        length: Tokens of a prompt.
        selection: ``each`` picture for itself, or the ``vote`` of a batch (see the module).
        feature: Mean output of the ``prompts``, as published, or of the ``class_token``.

    Raises:
        ValueError: More prompts are chosen than there are.
    """

    kind: Literal["l2p"]
    pool: int = Field(ge=1)
    chosen: int = Field(ge=1)
    length: int = Field(ge=1)
    selection: Literal["each", "vote"]
    feature: Literal["prompts", "class_token"]

    @model_validator(mode="after")
    def _enough(self) -> "L2pSettings":
        if self.chosen > self.pool:
            raise ValueError(f"chosen={self.chosen} prompts cannot be drawn from a pool={self.pool}")
        return self


class PromptPool(Prompts):
    """Prompts [pool, length, d] and keys [pool, d]."""

    def __init__(self, settings: L2pSettings, backbone: Backbone) -> None:
        """All zero until drawn.

        Raises:
            ValueError: The backbone is no plain ViT.
        """
        super().__init__(backbone)
        plain_vit(backbone, "L2P")
        self.settings = settings
        self.prompts = nn.Parameter(torch.zeros(settings.pool, settings.length, self.width))
        self.keys = nn.Parameter(torch.zeros(settings.pool, self.width))

    def choose(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Indices [n, chosen] of queries [n, d], the nearest first, and their cosines."""
        cosines = normalize(query, dim=1) @ normalize(self.keys, dim=1).T
        picked = cosines.topk(self.settings.chosen, dim=1).indices
        if self.settings.selection == "vote":
            votes = one_hot(picked, self.settings.pool).sum((0, 1))
            picked = votes.topk(self.settings.chosen).indices.expand(len(query), -1)
        return picked, cosines.gather(1, picked)

    def forward(self, backbone: Backbone, images: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        """See :meth:`Prompts.forward`."""
        with torch.no_grad():
            query = backbone(images)
        picked, cosines = self.choose(query)
        vit, extra = plain_vit(backbone, "L2P"), self.prompts[picked].flatten(1, 2)
        with backbone.computing(images.device):
            tokens = through(vit, insert(vit, embed(backbone, images), extra)).float()
        prompts = tokens[:, 1 : 1 + extra.shape[1]].mean(1)
        feature = prompts if self.settings.feature == "prompts" else tokens[:, 0]
        return feature, (1 - cosines).sum(1)


class L2pLinear(PromptedLinear):
    """L2P as published."""

    kind: ClassVar[str] = "l2p"


class L2pPrototypes(PromptedPrototypes):
    """L2P with class means of the prompted feature."""

    kind: ClassVar[str] = "l2p"


def make_l2p(settings: L2pSettings, n_classes: int, device: torch.device) -> L2pLinear | L2pPrototypes:
    """L2P with the head that the settings name.

    Raises:
        CheckpointError: There are no such weights.
        ValueError: The backbone is no plain ViT.
    """
    backbone = load_backbone(settings.backbone)
    made = L2pLinear if settings.head == "linear" else L2pPrototypes
    return made(settings, backbone, PromptPool(settings, backbone), n_classes, device)
