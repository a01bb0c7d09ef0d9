"""What a person sees while an experiment runs: a line for each epoch and session, and a Prefect artifact at the end."""

from prefect.artifacts import create_table_artifact
from rich.console import Console

from tasks.records import EpochRecord, ExperimentRecord, SessionAccuracy, SessionRecord, Usage

console = Console(stderr=True, highlight=False)


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
    console.print(f"  session {record.session} epoch {record.epoch}: {'; '.join(parts)}")


def say_session(record: SessionRecord) -> None:
    """One line: test accuracy of a sealed session, and what it cost."""
    accuracy = record.test.output.accuracy
    novel = "" if accuracy.novel is None else f", base {accuracy.base:.1%}, novel {accuracy.novel:.1%}"
    console.print(
        f"  session {record.session}: test {accuracy.overall:.1%}{novel} ({record.converged_because}); "
        f"{budget(record.images_drawn, record.usage, record.unparsed, record.drawing)}"
    )


def show_experiment(record: ExperimentRecord) -> None:
    """The sessions' accuracies on the flow run's page in Prefect."""
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
