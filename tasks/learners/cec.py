r"""CEC: "Few-Shot Incremental Learning with Continually Evolved Classifiers", CVPR 2021.

Chi Zhang, Nan Song, Guosheng Lin, Yun Zheng, Pan Pan, Yinghui Xu.

Old and new prototypes were made at different times without knowledge of each other: a graph attention layer
over all prototypes and the picture asked about adapts them to one another before they are compared. It learns
that in the base session from pseudo-incremental episodes, in which base classes, rotated, play the new ones;
later nothing trains.

    nodes   = [p_1 .. p_k, q], unit vectors times sqrt(d)
    adapted = LayerNorm(nodes + F softmax(Q K^T / sqrt(d)) V),   Q, K, V, F linear in the nodes
    logit_c = temperature * cos(adapted q, adapted p_c)

Deviations: nodes have one length, so that prototypes may be means of normalised features; an epoch of the
loop anneals by a cosine instead of in steps; the last weights are kept, where the released code chose them by
test accuracy; an episode shows each class as many pictures as there are, if fewer than asked for; generated
pictures count through ``generated_weight`` in prototypes and are left out of episodes. A left-out shot is
compared by the graph whose node of its class is made of the other shots.

Trains: backbone and graph in the base session, nothing later.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from tasks.classification.prototypes import LEAST_SIMILARITY, only_seen, rows_without
from tasks.classification.training import cosine_rate, make_optimizer
from tasks.learners.base import Progress, TrainingData
from tasks.learners.ncm_tuned import NcmTuned, TunedSettings
from tasks.learners.sessions import seeded, take_weights, weights_of
from tasks.records import Frozen
from tasks.seeding import seed_for, torch_generator

QUERY_BATCH = 64
QUARTER_TURNS = (1, 2, 3)


class EpisodeSettings(Frozen):
    """How the graph is trained in each epoch of the base session.

    Attributes:
        episodes: How many.
        ways: Base classes of an episode; as many pseudo-new ones are added.
        shots: Pictures that make each class's prototype.
        queries: Pictures of each class that are asked about.
        optimizer: As in :class:`RecipeSettings`, like the next three.
        momentum: Of SGD.
        weight_decay: Of all that is trained.
        learning_rate: The graph's.
        backbone_rate: The backbone's, as a share of the graph's; 0 freezes it.
    """

    episodes: int = Field(ge=0)
    ways: int = Field(ge=2)
    shots: int = Field(ge=1)
    queries: int = Field(ge=1)
    optimizer: Literal["adam", "sgd"]
    momentum: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0)
    learning_rate: float = Field(gt=0)
    backbone_rate: float = Field(ge=0)


class CecSettings(TunedSettings):
    """``kind`` chooses this learner; ``meta`` trains its graph."""

    kind: Literal["cec"]
    meta: EpisodeSettings


class GraphAttention(nn.Module):
    """One attention layer over sets of nodes; permuting the nodes permutes what comes out."""

    def __init__(self, width: int) -> None:
        """Projections of ``width`` to ``width``, drawn from torch's generator."""
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        for part in (self.query, self.key, self.value):
            nn.init.normal_(part.weight, std=math.sqrt(1 / width))
        nn.init.xavier_normal_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, nodes: Tensor) -> Tensor:
        """Nodes [b, k, d] to adapted nodes [b, k, d]."""
        scores = self.query(nodes) @ self.key(nodes).transpose(1, 2) / math.sqrt(nodes.shape[-1])
        return self.norm(nodes + self.out(torch.softmax(scores, dim=2) @ self.value(nodes)))


@dataclass(frozen=True)
class Episode:
    """A pseudo-incremental task: the classes 0 .. w-1 are real, w .. 2w-1 the same ones, rotated.

    Attributes:
        support: [2 w * shots, 3, s, s] in [0, 1], class by class.
        queries: [2 w * n, 3, s, s] in [0, 1], class by class.
        ways: 2 w.
    """

    support: Tensor
    queries: Tensor
    ways: int

    @property
    def labels(self) -> Tensor:
        """Class [2 w * n] of each query."""
        return torch.arange(self.ways).repeat_interleave(len(self.queries) // self.ways)


class Cec(NcmTuned):
    """Prototypes of a frozen backbone, adapted to one another and to the query by a graph."""

    kind: ClassVar[str] = "cec"

    def __init__(self, settings: CecSettings, n_classes: int, device: torch.device) -> None:
        """Load the backbone.

        Raises:
            CheckpointError: There are no such weights.
        """
        super().__init__(settings, n_classes, device)
        self.meta = settings.meta
        self.graph = self._new_graph(0)

    def learn(self, data: TrainingData, *, seed: int, progress: Progress | None = None) -> list[float]:
        """Base session: train backbone, then graph; returns mean losses of the passes and of the episodes.

        Raises:
            ValueError: As :meth:`Learner.learn`, or a base class has less than two pictures.
        """
        self._refuse_bad(data)
        if not self.in_base_session:
            self._update_prototypes(data)
            return []
        originals = data.of(~data.is_generated)
        refuse_single(originals.labels, self.new)
        if not self.known:
            self.graph = self._new_graph(seed_for(seed, "graph"))
        losses = self._train(data, seed, progress)
        losses += self._train_graph(originals, seed)
        self._update_prototypes(data)
        return losses

    # ------------------------------------------------------------------------------ episodes

    def _new_graph(self, seed: int) -> GraphAttention:
        with seeded(seed):
            return GraphAttention(self.backbone.width).to(self.device)

    def _train_graph(self, originals: TrainingData, seed: int) -> list[float]:
        meta, generator, losses = self.meta, torch_generator(seed, "episodes"), []
        self.backbone.eval().requires_grad_(meta.backbone_rate > 0)
        inner = [p for p in self.backbone.parameters() if p.requires_grad]
        groups = [
            {"params": [*self.graph.parameters()], "lr": meta.learning_rate},
            {"params": inner, "lr": meta.learning_rate * meta.backbone_rate},
        ]
        optimizer = make_optimizer(groups, meta.optimizer, meta.momentum, meta.weight_decay)
        rates = [group["lr"] for group in optimizer.param_groups]
        for done in range(meta.episodes):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * cosine_rate(done / meta.episodes)
            loss = self._episode_loss(draw_episode(originals.images, originals.labels, meta, generator))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        self.backbone.requires_grad_(True)
        if not all(map(math.isfinite, losses)):
            raise ValueError("the loss of CEC's episodes is not finite; lower learner.meta.learning_rate")
        return [sum(losses) / len(losses)] if losses else []

    def _episode_loss(self, episode: Episode) -> Tensor:
        with torch.set_grad_enabled(self.meta.backbone_rate > 0):
            features = self.backbone(torch.cat([episode.support, episode.queries]).to(self.device))
        support, queries = features.split([len(episode.support), len(episode.queries)])
        rows = normalize(support, dim=1).view(episode.ways, -1, features.shape[1]).mean(1)
        logits = self._compare(queries, normalize(rows, dim=1).expand(len(queries), -1, -1))
        return cross_entropy(logits, episode.labels.to(self.device))

    # ------------------------------------------------------------------------------ predicting

    def _compare(self, features: Tensor, rows: Tensor) -> Tensor:
        """Logits [n, k] of features [n, d], each by the graph with its own rows [n, k, d]."""
        nodes = torch.cat([rows, normalize(features, dim=1)[:, None]], dim=1)
        adapted = normalize(self.graph(nodes * math.sqrt(nodes.shape[-1])), dim=2)
        return self.temperature * (adapted[:, :-1] @ adapted[:, -1:].transpose(1, 2)).squeeze(2)

    @torch.no_grad()
    def _logits(self, features: Tensor, rows: Tensor, seen: tuple[int, ...]) -> Tensor:
        """Logits [n, n_classes] of features [n, d] and rows [n, len(seen), d], in parts, on the CPU."""
        logits = torch.zeros(len(features), self.n_classes)
        for start in range(0, len(features), QUERY_BATCH):
            part = slice(start, start + QUERY_BATCH)
            found = self._compare(features[part].to(self.device), rows[part].to(self.device))
            logits[part, list(seen)] = found.cpu()
        return only_seen(logits, seen)

    def predict(self, images: Tensor, seen: Sequence[int]) -> Tensor:
        """See :meth:`Learner.predict`."""
        self._refuse_unknown(seen)
        rows = self.rows[list(seen)].expand(len(images), -1, -1)
        return self._logits(self.features(images), rows, tuple(seen))

    def predict_shots(self, data: TrainingData, seen: Sequence[int]) -> Tensor:
        """See :meth:`Learner.predict_shots`."""
        self._refuse_unknown(seen)
        features, shots = self.features(data.images), ~data.is_generated
        without, anything_left = rows_without(
            features, data.labels, data.is_generated, self.n_classes, self.generated_weight
        )
        own, each = data.labels[shots], torch.arange(int(shots.sum()))
        rows = self.rows.repeat(len(own), 1, 1)
        rows[each, own] = without
        logits = self._logits(features[shots], rows[:, list(seen)], tuple(seen))
        logits[each[~anything_left], own[~anything_left]] = self.temperature * LEAST_SIMILARITY
        return logits

    # ------------------------------------------------------------------------------ checkpoints

    def _tensors(self) -> dict[str, Tensor]:
        return {**super()._tensors(), **weights_of("graph", self.graph)}

    def _take(self, tensors: dict[str, Tensor]) -> None:
        super()._take(tensors)
        take_weights("graph", self.graph, tensors)


def refuse_single(labels: Tensor, classes: Sequence[int]) -> None:
    """ValueError if one of ``classes`` has less than two pictures: one for a prototype, one to ask about."""
    for a_class in classes:
        if (count := int((labels == a_class).sum())) < 2:
            raise ValueError(
                f"CEC's episodes need two pictures of each base class, but class {a_class} has {count}; "
                f"raise dataset.base_shots or lower dataset.holdout"
            )


def draw_episode(
    images: Tensor, labels: Tensor, settings: EpisodeSettings, generator: torch.Generator
) -> Episode:
    """Draw classes, their pictures, and a quarter turn for each class's pseudo-new double.

    Args:
        images: [n, 3, s, s] in [0, 1].
        labels: int64 [n], at least two pictures of each class.
        settings: How many of each; fewer where there are not so many.
        generator: Of all draws.
    """
    classes = labels.unique()
    chosen = classes[torch.randperm(len(classes), generator=generator)[: settings.ways]]
    fewest = int(torch.bincount(labels)[chosen].min())
    shots = min(settings.shots, max(1, fewest - settings.queries))
    wanted = min(shots + settings.queries, fewest)
    drawn = []
    for a_class in chosen:
        pictures = images[labels == a_class]
        drawn.append(pictures[torch.randperm(len(pictures), generator=generator)[:wanted]])
    turns = torch.randint(len(QUARTER_TURNS), (len(chosen),), generator=generator).tolist()
    doubles = [
        torch.rot90(part, QUARTER_TURNS[turn], (2, 3)) for part, turn in zip(drawn, turns, strict=True)
    ]
    all_classes = [*drawn, *doubles]
    return Episode(
        support=torch.cat([part[:shots] for part in all_classes]),
        queries=torch.cat([part[shots:] for part in all_classes]),
        ways=len(all_classes),
    )
