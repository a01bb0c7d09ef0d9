import pytest
import torch

from tasks.classification.metrics import margins, predictions_from_logits
from tasks.records import Prediction

INF = float("inf")


def test_margin_is_own_logit_minus_the_best_other():
    logits = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0]])
    assert margins(logits, torch.tensor([0, 1])).tolist() == [1.0, -2.0]


def test_predictions():
    logits = torch.tensor([[3.0, 1.0, -INF], [0.0, 0.0, -INF]])
    assert predictions_from_logits(["a", "b"], torch.tensor([1, 1]), logits, (0, 1)) == [
        Prediction(image_id="a", label=1, predicted=0, margin=-2.0),
        Prediction(image_id="b", label=1, predicted=0, margin=0.0),
    ]


def test_unseen_classes_are_never_predicted_however_large_their_logits():
    logits = torch.tensor([[9.0, 0.0, 9.0, 1.0]])
    (found,) = predictions_from_logits(["a"], torch.tensor([3]), logits, (3, 1))
    assert found == Prediction(image_id="a", label=3, predicted=3, margin=1.0)


@pytest.mark.parametrize(
    ("ids", "label", "logits", "seen", "message"),
    [
        (["a", "b"], 0, [[1.0, 2.0]], (0, 1), "2 ids, 1 labels and 1 rows"),
        (["a"], 0, [[1.0, 2.0]], (0,), "at least two classes"),
        (["a"], 2, [[1.0, 2.0, 3.0]], (0, 1), "label 2 is not among"),
        (["a"], 0, [[1.0, float("nan")]], (0, 1), "picture 'a' a logit that is not finite"),
        (["a"], 0, [[1.0, -INF]], (0, 1), "not finite"),
    ],
)
def test_nonsense_is_refused(ids, label, logits, seen, message):
    with pytest.raises(ValueError, match=message):
        predictions_from_logits(ids, torch.tensor([label]), torch.tensor(logits), seen)
