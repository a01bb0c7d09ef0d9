"""From settings to a learner: the one list of all learners.

``configs/learner/<name>.yaml`` holds the settings that we recommend, ``<name>_as_published.yaml`` what the publication
sets otherwise: ``method=cec learner=cec_as_published``.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field

from tasks.learners.base import Learner
from tasks.learners.cec import Cec, CecSettings
from tasks.learners.dualprompt import DualPromptSettings, make_dualprompt
from tasks.learners.finetune_proto import FinetuneProto, FinetuneProtoSettings
from tasks.learners.l2p import L2pSettings, make_l2p
from tasks.learners.nc_fscil import NcFscil, NcFscilSettings
from tasks.learners.ncm import Ncm, NcmSettings
from tasks.learners.ncm_tuned import NcmTuned, NcmTunedSettings
from tasks.learners.privilege import Privilege, PrivilegeSettings
from tasks.learners.teen import Teen, TeenSettings
from tasks.learners.warp import Warp, WarpSettings

LearnerSettings = Annotated[
    FinetuneProtoSettings
    | NcmSettings
    | NcmTunedSettings
    | TeenSettings
    | CecSettings
    | NcFscilSettings
    | L2pSettings
    | DualPromptSettings
    | WarpSettings
    | PrivilegeSettings,
    Field(discriminator="kind"),
]

LEARNERS: dict[str, Callable[[Any, int, torch.device], Learner]] = {
    "finetune_proto": FinetuneProto,
    "ncm": Ncm,
    "ncm_tuned": NcmTuned,
    "teen": Teen,
    "cec": Cec,
    "nc_fscil": NcFscil,
    "l2p": make_l2p,
    "dualprompt": make_dualprompt,
    "warp": Warp,
}
"""By kind: built of its settings, the number of classes of all sessions, and the device."""

NAMED: dict[str, Callable[[Any, int, torch.device, Sequence[str]], Learner]] = {"privilege": Privilege}
"""The same of learners that read the class names too."""


def make_learner(
    settings: LearnerSettings, n_classes: int, device: torch.device, class_names: Sequence[str] = ()
) -> Learner:
    """Build the learner that ``settings.kind`` names, with its pre-trained weights.

    Args:
        settings: One of the learners' settings.
        n_classes: Classes of all sessions; columns of its logits.
        device: Where it computes.
        class_names: The word for each label, for learners that read them.

    Raises:
        CheckpointError: There are no such weights.
        ValueError: The learner cannot be had with so many classes or on this backbone, or lacks their names.
    """
    if settings.kind in NAMED:
        return NAMED[settings.kind](settings, n_classes, device, class_names)
    return LEARNERS[settings.kind](settings, n_classes, device)


def check_learner(settings: LearnerSettings, class_names: Sequence[str], n_sessions: int) -> None:
    """Refuse, before any training, a learner that could not be built or could not go through all sessions.

    Args:
        settings: One of the learners' settings; ``max_sessions``, where they have it, is how many it can take.
        class_names: Of all sessions, by label.
        n_sessions: Sessions, the base session among them.

    Raises:
        CheckpointError: There are no such weights.
        ValueError: As :func:`make_learner`, or there are more sessions than it can take.
    """
    most = getattr(settings, "max_sessions", None)
    if most is not None and n_sessions > most:
        raise ValueError(
            f"learner {settings.kind} can take {most} sessions, but the dataset has {n_sessions}; "
            f"enlarge its pool or set dataset.n_sessions={most - 1}"
        )
    make_learner(settings, len(class_names), torch.device("cpu"), class_names)
