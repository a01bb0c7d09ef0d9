"""A trace for people: nested lines, as a tree on a terminal and indented elsewhere.

What a VLM wrote is printed on one line, without markup and without control characters.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from rich.text import Text
from rich.tree import Tree

from flows.trace_shape import (
    AdapterTrace,
    ArtifactTrace,
    CellTrace,
    Counted,
    Failure,
    ImageTrace,
    Judged,
    Origin,
    Seed,
    Step,
    Trace,
    Tuned,
)
from tasks.text import shortened

Item = TypeVar("Item")

LINE_CHARS = 2000
SHOWN = 12
"""Failures, earlier tunings and images of a slot that are listed; the JSON has all of them."""


class Node(NamedTuple):
    """A line and what belongs to it."""

    text: str
    below: tuple["Node", ...] = ()


def node(text: str, *below: Node) -> Node:
    """A line, made safe to print."""
    return Node(shortened(safe(text), LINE_CHARS), below)


def safe(text: str) -> str:
    """One line of printable characters; others are shown by their numbers."""
    words = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in words)


def tree(root: Node) -> Tree:
    """For a terminal."""
    grown = Tree(Text(root.text))
    _grow(grown, root)
    return grown


def _grow(grown: Tree, root: Node) -> None:
    for child in root.below:
        _grow(grown.add(Text(child.text)), child)


def lines(root: Node, depth: int = 0) -> Iterator[str]:
    """For a file or a pipe: indented by two blanks."""
    yield "  " * depth + root.text
    for child in root.below:
        yield from lines(child, depth + 1)


def nodes(found: Trace) -> Node:
    """The lines of any trace."""
    if isinstance(found, ImageTrace):
        return _image(found)
    if isinstance(found, AdapterTrace):
        return _adapter(found)
    return _artifact(found) if isinstance(found, ArtifactTrace) else _cell(found)


def _some(items: Sequence[Item], shown: Callable[[Item], Node]) -> list[Node]:
    """A line for each of the first, and how many there are more."""
    more = len(items) - SHOWN
    return [*map(shown, items[:SHOWN]), *([node(f"and {more} more")] if more > 0 else [])]


# ------------------------------------------------------------------------------------------ an image


def _image(found: ImageTrace) -> Node:
    doubled = f"doubles {found.source_id}" if found.source_id else "replays an earlier class"
    settings = node("drawn with", *_settings(found.settings), node(f"batch shape {list(found.batch_shape)}"))
    return node(
        f"image {found.image_id}: {found.class_name} ({found.label}), slot {found.slot}, {doubled}",
        node(f"run {found.run}, session {found.session}, drawn for epoch {found.epoch}, in {found.folder}"),
        node("prompt and rewritings", *_first_prompt(found), *_steps(found.steps)),
        node(f"generator weights {found.generator}; the session's images {found.session_data or 'unknown'}"),
        _adapter(found.adapter, nested=True) if found.adapter else node("adapter: none, the base generator"),
        settings,
        _origin(found.origin),
        *_ends(found.commands, found.also_in),
    )


def _first_prompt(found: ImageTrace) -> list[Node]:
    if found.first_prompt == "base":
        return [node("begins with the base prompt")]
    known = f", such as {found.learned_from[0]}" if found.learned_from else ""
    return [node(f"begins with a prompt of {len(found.learned_from)} images of the session before{known}")]


def _steps(steps: tuple[Step, ...]) -> list[Node]:
    """The slot's first image and its last ones."""
    between = len(steps) - SHOWN
    if between <= 0:
        return [_step(step) for step in steps]
    return [_step(steps[0]), node(f"and {between} more"), *map(_step, steps[between + 1 :])]


def _step(step: Step) -> Node:
    below = [
        node(f"prompt: {step.prompt}"),
        node(f"seed {step.seed}, adapter {step.adapter or 'none'}"),
        node(f"file {step.file}, digest {step.digest}{'' if step.intact else ', WHICH IT HAS NO MORE'}"),
    ]
    if step.predicted is not None:
        said, right = step.predicted, "rightly" if step.predicted.correct else "wrongly"
        margin = "" if said.margin is None else f", margin {said.margin:.3g}"
        below.append(
            node(f"classified {right} as {said.class_name}{margin}, by classifier {said.classifier}")
        )
    if step.judged is not None:
        below.append(_verdict(step.judged))
    return node(f"epoch {step.epoch}: {step.image_id}", *below)


def _verdict(judged: Judged) -> Node:
    own = f", inherited from {judged.inherited_from}" if judged.inherited_from else ""
    return node(
        f"verdict: {judged.level}{own}; next prompt: {judged.prompt_next}",
        *(
            node(
                f"{one.answer}: {one.original_id}{' (the target of the rewriting)' if one.target else ''}",
                node(f"generated: {one.caption_augmented}"),
                node(f"original: {one.caption_original}"),
            )
            for one in judged.comparisons
        ),
    )


# ------------------------------------------------------------------------------------------ an adapter


def _adapter(found: AdapterTrace, *, nested: bool = False) -> Node:
    return node(
        f"adapter {found.tuning.adapter}, {_tuning(found.tuning)}",
        node(f"steps drawn: {', '.join(f'{step} ({n} x)' for step, n in found.tuning.steps_drawn.items())}"),
        node(f"failures found by classifier {found.tuning.classifier}", *_some(found.failures, _failure)),
        node("tuned with", *_settings(found.settings)),
        node("before it", *_some(found.before, lambda one: node(f"{one.adapter}, {_tuning(one)}")))
        if found.before
        else node("tuned from the base generator"),
        *([] if nested else [_origin(found.origin)]),
        *_ends(found.commands, found.also_in),
    )


def _tuning(one: Tuned) -> str:
    loss = f", loss {one.loss[0]:.3f} -> {one.loss[1]:.3f}" if one.loss else ""
    return (
        f"tuned in session {one.session} epoch {one.epoch} by {one.updates} updates{loss} on {one.failures} failures "
        f"and {one.negatives} negatives, seed {one.seed}, in {one.folder}"
    )


def _failure(one: Failure) -> Node:
    negatives = ", ".join(f"{n.image_id} (SSIM {n.ssim:.2f})" for n in one.negatives)
    tuned = [node(f"{example.level}, from {example.centre}: {example.prompt}") for example in one.examples]
    return node(
        f"{one.path} ({one.digest}): {one.class_name}, taken for {one.predicted_class}",
        *(tuned or [node("nothing was tuned towards it: its centres aim at other failures")]),
        node(f"negatives: {negatives or 'none'}"),
    )


# ------------------------------------------------------------------------------------------ the rest


def _artifact(found: ArtifactTrace) -> Node:
    inputs = (node(f"{name}: {digest}") for name, digest in found.inputs.items())
    return node(
        f"{found.what} {found.digest}, of {found.stage} in {found.folder}",
        node(f"fingerprint {found.fingerprint}, version {found.version}, seed {found.seed}"),
        node("read", *inputs),
        node("settings", *_settings(found.settings)),
        _origin(found.origin),
        *_ends(found.commands, found.also_in),
    )


def _cell(found: CellTrace) -> Node:
    show: Callable[[float | None], str] = lambda value: "-" if value is None else _number(value)  # noqa: E731
    spread = "" if found.std is None else f", standard deviation {show(found.std)}"
    return node(
        f"{found.column} of {found.method} on {found.dataset}: mean {show(found.mean)}{spread}, {len(found.seeds)} seeds",
        *(_seed(seed, show(seed.value)) for seed in found.seeds),
        *(node(f"unfinished: {root}") for root in found.unfinished),
    )


def _seed(seed: Seed, value: str) -> Node:
    differs = "" if seed.agrees else ", WHICH ITS experiment.json DOES NOT SAY"
    counts = (node(f"session {s.session}: {_counts(s)}, in {s.record}") for s in seed.sessions)
    epochs = node("epochs", *(node(command) for command in seed.commands))
    return node(f"seed {seed.seed}: {value}{differs}", *counts, epochs, _origin(seed.origin))


def _counts(found: Counted) -> str:
    novel = f"{found.correct - found.base_correct} of {found.total - found.base_total}"
    return (
        f"{found.correct} of {found.total} (base {found.base_correct} of {found.base_total}, novel {novel})"
    )


def _number(value: float) -> str:
    return f"{100 * value:.2f} %" if abs(value) <= 1 else f"{value:,.1f}"


def _origin(origin: Origin) -> Node:
    below = [node(f"config digest {origin.config_digest}"), *_settings(origin.settings)]
    if origin.config_digest and origin.packages is None:
        below.append(
            node(
                "commit, packages and data digest are not known: neither the run's state nor its pointer is here"
            )
        )
    else:
        dirty = " with changes" if origin.git_dirty else ""
        below += [
            node(f"git commit {origin.git_commit or 'unknown'}{dirty}"),
            node(f"data digest {origin.data_digest}"),
            node(f"weights: {', '.join(f'{k} {v}' for k, v in (origin.weights_digests or {}).items())}"),
            node(f"packages: {', '.join(f'{k} {v}' for k, v in (origin.packages or {}).items())}"),
            node(f"command: {' '.join(origin.command or ())}"),
            node(
                f"computed on {origin.device or 'an unknown device'}, {origin.threads or 'unknown'} threads"
            ),
        ]
    return node(f"run {origin.run}", *below)


def _settings(settings: dict[str, object]) -> list[Node]:
    """A line for each group: its settings side by side."""
    shown = []
    for name, value in settings.items():
        said = ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else value
        shown.append(node(f"{name}: {said}"))
    return shown


def _ends(commands: tuple[str, ...], also: tuple[str, ...]) -> list[Node]:
    shown = [node(f"again: {command}") for command in commands]
    if also:
        shown.append(node(f"the same content is in {len(also)} more places, such as {also[0]}"))
    return shown
