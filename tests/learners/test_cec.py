import pytest
import torch

from tasks.learners.cec import Cec, CecSettings, EpisodeSettings, GraphAttention, draw_episode
from tasks.learners.sessions import seeded
from tests.learners.given import base_data, recipe, session_data
from tests.tiny_vit import save_tiny_vit

ALL = (0, 1, 2, 3, 4)
META = {
    "episodes": 4,
    "ways": 3,
    "shots": 2,
    "queries": 3,
    "optimizer": "adam",
    "momentum": 0.0,
    "weight_decay": 0.0,
    "learning_rate": 1e-3,
    "backbone_rate": 0.0,
}


def make(folder, **meta):
    settings = CecSettings(
        kind="cec",
        backbone=save_tiny_vit(folder),
        temperature=16.0,
        generated_weight=0.5,
        base=recipe(passes=0),
        meta=EpisodeSettings.model_validate(META | meta),
    )
    return Cec(settings, 5, torch.device("cpu"))


def after_base(learner):
    learner.begin_session((0, 1, 2), (0, 1, 2))
    learner.learn(base_data(), seed=0)
    return learner


def weights(module):
    return [p.detach().clone() for p in module.parameters()]


def moved(before, module):
    return [not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True)]


@pytest.fixture
def graph():
    with seeded(0):
        return GraphAttention(8)


# ------------------------------------------------------------------------------------------ the graph


def test_permuting_nodes_permutes_what_comes_out(graph):
    nodes, order = torch.randn(2, 5, 8), torch.tensor([3, 0, 4, 1, 2])
    assert torch.allclose(graph(nodes[:, order]), graph(nodes)[:, order], atol=1e-5)


def test_each_node_depends_on_all(graph):
    nodes = torch.randn(1, 4, 8, requires_grad=True)
    graph(nodes)[0, 0, 0].backward()
    assert (nodes.grad.abs().sum(2) > 0).all()


def test_the_graph_is_attention_by_hand(graph):
    nodes = torch.randn(1, 3, 8)
    q, k, v = (part(nodes[0]) for part in (graph.query, graph.key, graph.value))
    rows = []
    for i in range(3):
        share = torch.stack([(q[i] * k[j]).sum() / 8**0.5 for j in range(3)]).exp()
        rows.append(sum(share[j] / share.sum() * v[j] for j in range(3)))
    expected = graph.norm(nodes[0] + graph.out(torch.stack(rows)))
    assert torch.allclose(graph(nodes)[0], expected, atol=1e-5)


def test_order_of_the_classes_seen_does_not_matter(tmp_path):
    learner = after_base(make(tmp_path))
    images = base_data().images
    assert torch.allclose(learner.predict(images, (0, 1, 2)), learner.predict(images, (2, 0, 1)), atol=1e-4)


# ------------------------------------------------------------------------------------------ episodes


def test_pseudo_new_classes_are_rotations_of_the_real_ones():
    data = base_data()
    episode = draw_episode(
        data.images, data.labels, EpisodeSettings.model_validate(META), torch.Generator().manual_seed(0)
    )
    assert (episode.ways, len(episode.support), len(episode.queries)) == (6, 12, 18)
    assert episode.labels.tolist() == [c for c in range(6) for _ in range(3)]
    for part, count in ((episode.support, 2), (episode.queries, 3)):
        classes = part.view(6, count, 3, 16, 16)
        for real, double in zip(classes[:3], classes[3:], strict=True):
            turns = [k for k in (1, 2, 3) if torch.equal(torch.rot90(real, k, (2, 3)), double)]
            assert len(turns) == 1


def test_no_picture_is_both_shown_and_asked_about():
    data = base_data()
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        episode = draw_episode(data.images, data.labels, EpisodeSettings.model_validate(META), generator)
        shown = {image.numpy().tobytes() for image in episode.support}
        assert not shown & {image.numpy().tobytes() for image in episode.queries}
        assert len(shown) == len(episode.support)


def test_few_pictures_make_small_episodes_and_one_is_refused(tmp_path):
    data = base_data(2)
    episode = draw_episode(
        data.images, data.labels, EpisodeSettings.model_validate(META), torch.Generator().manual_seed(0)
    )
    assert (len(episode.support), len(episode.queries)) == (6, 6)
    learner = make(tmp_path)
    learner.begin_session((0, 1, 2), (0, 1, 2))
    with pytest.raises(ValueError, match="two pictures of each base class, but class 0 has 1"):
        learner.learn(base_data(1), seed=0)


# ------------------------------------------------------------------------------------------ training


def test_episodes_train_the_graph_and_leave_a_frozen_backbone(tmp_path):
    learner = make(tmp_path)
    inner, outer = weights(learner.backbone), weights(learner.graph)
    after_base(learner)
    assert not any(moved(inner, learner.backbone))
    assert all(moved(outer, learner.graph))
    assert all(p.requires_grad for p in learner.backbone.parameters())


def test_episodes_can_train_the_backbone(tmp_path):
    learner = make(tmp_path, backbone_rate=0.1)
    inner = weights(learner.backbone)
    after_base(learner)
    assert any(moved(inner, learner.backbone))


def test_later_sessions_train_nothing(tmp_path):
    learner = after_base(make(tmp_path))
    inner, outer, rows = weights(learner.backbone), weights(learner.graph), learner.rows[:3].clone()
    learner.begin_session((3, 4), ALL)
    assert learner.learn(session_data(), seed=1) == []
    assert not any(moved(inner, learner.backbone) + moved(outer, learner.graph))
    assert torch.equal(learner.rows[:3], rows)


def test_a_left_out_shot_meets_a_graph_without_it(tmp_path):
    learner = after_base(make(tmp_path))
    shots = session_data()
    learner.begin_session((3, 4), ALL)
    learner.learn(shots, seed=0)
    found = learner.predict_shots(shots, ALL)
    learner.learn(shots.of(torch.tensor([1, 2, 3, 4, 5])), seed=0)
    assert torch.allclose(found[:1], learner.predict(shots.images[:1], ALL), atol=1e-4)
