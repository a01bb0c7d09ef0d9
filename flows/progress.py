"""What a person sees while an experiment runs: lines in the terminal, and the same in the run's log in Prefect.

Each flow run has its own log: a session's holds its epochs, the experiment's its start, its sessions and its end.
The lines reach it at INFO even where ``PREFECT_LOGGING_LEVEL`` keeps Prefect's own quiet, go there in the background,
and are not printed again. Outside a flow run there is only the terminal.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from prefect import get_client
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.context import FlowRunContext
from prefect.logging.handlers import APILogHandler
from rich.console import Console

from flows.config import ExperimentConfig
from flows.server_lost import extra
from flows.session_page import artifact_key, mlflow_place, session_page
from tasks.records import EpochRecord, ExperimentRecord, SessionAccuracy, SessionRecord, Usage
from tasks.text import readable

console = Console(stderr=True, highlight=False)
_log = logging.getLogger("fscil.runs")


def note(line: str) -> None:
    """A line of the log of the flow run under way, if there is one."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return
    if not _log.handlers:
        _log.addHandler(APILogHandler())
        _log.setLevel(logging.INFO)
        _log.propagate = False  # the terminal has its own line
    _log.info(line, extra={"flow_run_id": context.flow_run.id})


def say(line: str) -> None:
    """A line in the terminal and in the run's log."""
    console.print(f"  {readable(line)}", markup=False)
    note(line)


def tag_run(*tags: str) -> None:
    """Give tags to the flow run under way, beside those of its deployment.

    Its tasks get none: Prefect looks for a concurrency limit of each tag before and after each task.
    """
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return
    with extra("tags"), get_client(sync_client=True) as client:
        client.update_flow_run(context.flow_run.id, tags=sorted({*context.flow_run.tags, *tags}))


def say_epoch(record: EpochRecord) -> None:
    """One line: what validation said, what the VLM and the tuner did."""
    out = record.evaluate.output
    parts = [f"validation {_counts(out.validation)}"]
    if out.augmented.counts:
        parts.append(f"generated read rightly {_counts(out.augmented)}")
    if record.compare:
        compared = record.compare.output
        parts.append(
            f"verdicts {compared.semantic} semantic {compared.detail} detail, {compared.rewritten} prompts changed"
        )
    if record.tune and record.tune.output.updates:
        series = record.tune.output.series  # without L_P and L_C no SSIM is measured
        name, shown = ("ssim_positive", "SSIM to failures") if "ssim_positive" in series else ("loss", "loss")
        parts.append(f"tuned, {shown} {series[name][0]:.2f} -> {series[name][-1]:.2f}")
    say(f"session {record.session} epoch {record.epoch}: {'; '.join(parts)}")


def session_line(record: SessionRecord) -> str:
    """Test accuracy of a sealed session, why it ended, and what it cost."""
    accuracy = record.test.output.accuracy
    novel = "" if accuracy.novel is None else f", base {accuracy.base:.1%}, novel {accuracy.novel:.1%}"
    return (
        f"session {record.session}: test {accuracy.overall:.1%}{novel} ({record.converged_because}); "
        f"{budget(record.images_drawn, record.usage, record.unparsed, record.drawing)}"
    )


def show_session(
    config: ExperimentConfig,
    record: SessionRecord,
    epochs: Sequence[EpochRecord],
    folder: Path,
    tracked: str | None,
) -> None:
    """The session's page, as an artifact of its flow run; ``tracked`` is its address in MLflow's UI."""
    if FlowRunContext.get() is None:
        return
    title = f"{config.dataset.name} · {config.method} · seed {config.seed} · session {record.session}"
    place = f"{config.runtime.runs.name}/{config.run_key}/{folder.name}"
    spent = budget(record.images_drawn, record.usage, record.unparsed, record.drawing)
    mlflow = mlflow_place(config.tracking, config.run_key, tracked)
    places = [f"Results: `{place}`", mlflow, f"Spent: {spent}"]
    page = session_page(title, record, epochs, folder, places)
    with extra("page of the session"):
        create_markdown_artifact(page, artifact_key(title), f"{title}: epochs, pictures, test accuracy")


def show_tracked(run: str, page: str | None) -> None:
    """A link to the run in MLflow's UI, if it is there, on the flow run's page from its start."""
    if page is None or FlowRunContext.get() is None:
        return
    with extra("link to MLflow"):
        said = f"{run} in MLflow: metrics, images, prompts and adapters by epoch"
        create_link_artifact(page, f"{run} in MLflow", artifact_key(run, "mlflow"), said)


def show_experiment(record: ExperimentRecord) -> None:
    """The sessions' accuracies on the flow run's page in Prefect, and its log's last line."""
    rows = [
        {
            "session": session.session,
            "classes": len(session.counts),
            "accuracy": f"{session.overall:.1%}",
            "base": f"{session.base:.1%}",
            "novel": "" if session.novel is None else f"{session.novel:.1%}",
        }
        for session in record.sessions
    ]
    spent = budget(record.images_drawn, record.usage, record.unparsed, record.drawing)
    note(f"done: A_base {record.a_base:.1%}, A_last {record.a_last:.1%}, A_avg {record.a_avg:.1%}; {spent}")
    with extra("table of sessions"):
        create_table_artifact(
            table=rows, key="session-accuracy", description=f"{record.run}: test accuracy by session; {spent}"
        )


def budget(images: int, usage: Usage, unparsed: int, drawing: Usage) -> str:
    """What was drawn and asked, in words; answers that could not be read are named where there are any."""
    price = "" if drawing.cost is None else f" for {drawing.cost:.2f}"
    text = f"{images:,} images drawn{price}, {usage.calls:,} VLM calls, {usage.tokens:,} tokens"
    if usage.cost is not None:
        text += f", cost {usage.cost:.2f}"
    return f"{text}, {unparsed:,} unparsed" if unparsed else text


def _counts(accuracy: SessionAccuracy) -> str:
    return f"{sum(c.correct for c in accuracy.counts)}/{sum(c.total for c in accuracy.counts)}"
