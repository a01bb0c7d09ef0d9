"""The dialogues with the VLM as MLflow traces: one a stage that asked, with a span a call, made from its transcript.

    root     how many calls were asked and what came of them; from the stage's start to its sealing
    span     ``CHAT_MODEL``: the messages, pictures by their md5 in place of content, the reply, the tokens, the model

Single calls are not timed in the records, so each span stands at the end of its stage and has no length. The ids are
made from content, so a trace that is written again replaces itself.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.records import Usage
from tasks.store import Timing, read_lines
from tasks.tracking_runs import Runs, patient
from tasks.vlm.client import Exchange

if TYPE_CHECKING:
    from mlflow.entities import Run, Span

_NAME = 80  # characters of a reply that name its span
_TEXT = 20_000  # characters of a message or a reply that are shown


def log_dialogue(
    runs: Runs,
    run: "Run",
    title: str,
    transcript: Path,
    timing: Timing | None,
    outcome: Mapping[str, object],
) -> None:
    """Write a stage's calls as one trace of a run; nothing where none were made.

    Args:
        runs: MLflow; its settings say how many calls a trace shows.
        run: whose trace it is.
        title: what asked, such as ``session 0 · epoch 1 · compare``.
        transcript: JSON lines of :class:`~tasks.vlm.client.Exchange`.
        timing: of the stage; None leaves the time at the epoch of Unix time.
        outcome: what came of it, shown as the root's output.

    Raises:
        StoreError: the transcript is damaged.
    """
    shown = runs.settings.traced_calls
    exchanges = read_lines(transcript, Exchange) if shown else []
    if not exchanges:
        return
    ended = timing.timestamp_ms * 1_000_000 if timing else 0
    began = ended - int(timing.seconds * 1e9) if timing else 0
    trace = _digest(run.info.run_id, title)
    asked = {"calls": len(exchanges), "shown": min(shown, len(exchanges))}
    root = _span(trace, _digest(title)[:16], None, title, (began, ended), {
        "mlflow.spanType": "CHAIN", "mlflow.spanInputs": asked, "mlflow.spanOutputs": dict(outcome),
    })  # fmt: skip
    calls = islice(_calls(trace, root.span_id, exchanges, ended), shown)
    usage = Usage.total(exchange.reply.usage for exchange in exchanges)
    _write(runs, run, [root, *calls], usage, (ended - began) // 1_000_000)


def _write(runs: Runs, run: "Run", spans: "Sequence[Span]", usage: Usage, milliseconds: int) -> None:
    from mlflow.entities import TraceInfo, TraceLocation, TraceState
    from mlflow.tracing.client import TracingClient

    root = spans[0]
    tokens = {
        "input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens, "total_tokens": usage.tokens,
    }  # fmt: skip
    info = TraceInfo(
        trace_id=root.trace_id,
        trace_location=TraceLocation.from_experiment_id(runs.experiment_id),
        request_time=root.start_time_ns // 1_000_000,
        execution_duration=milliseconds,
        state=TraceState.OK,
        request_preview=root.name,
        response_preview=", ".join(
            f"{name} {value}" for name, value in {**root.inputs, **root.outputs}.items()
        ),
        trace_metadata={
            "mlflow.sourceRun": run.info.run_id,
            "mlflow.trace.tokenUsage": json.dumps(tokens),
            "mlflow.trace_schema.version": "3",
        },
        tags={"mlflow.traceName": root.name, "mlflow.trace.spansLocation": "TRACKING_STORE"},
    )
    client = TracingClient(patient(runs.settings.uri))
    client.start_trace(info)
    client.log_spans(runs.experiment_id, list(spans))


def _calls(trace: str, root: str, exchanges: Sequence[Exchange], at: int) -> "Iterator[Span]":
    for number, exchange in enumerate(exchanges):
        usage, said = exchange.reply.usage, exchange.reply.text.split("\n", 1)[0]
        name = f"{number + 1}: {said[:_NAME]}"
        messages = [_message(message.role, message.content) for message in exchange.messages]
        answer = {"role": "assistant", "content": exchange.reply.text[:_TEXT]}
        yield _span(trace, _digest(exchange.key, str(number))[:16], root, name, (at, at), {
            "mlflow.spanType": "CHAT_MODEL",
            "mlflow.spanInputs": {"messages": messages, **exchange.sampling.model_dump()},
            "mlflow.spanOutputs": {"choices": [{"message": answer}]},
            "mlflow.chat.tokenUsage": {
                "input_tokens": usage.prompt_tokens,
                "output_tokens": usage.completion_tokens,
                "total_tokens": usage.tokens,
            },
            "mlflow.llm.model": exchange.reply.model,
            "fscil.key": exchange.key,
        })  # fmt: skip


def _message(role: str, content: Sequence[Mapping[Any, str]]) -> dict[str, str]:
    parts = (part.get("text") or f"[picture, md5 {part['image']}]" for part in content)
    return {"role": role, "content": "\n".join(parts)[:_TEXT]}


def _span(
    trace: str,
    span: str,
    parent: str | None,
    name: str,
    times: tuple[int, int],
    attributes: dict[str, object],
) -> "Span":
    from mlflow.entities import Span

    told = {"mlflow.traceRequestId": f"tr-{trace}"} | attributes
    return Span.from_dict({
        "trace_id": f"tr-{trace}", "span_id": span, "parent_span_id": parent, "name": name,
        "start_time_unix_nano": times[0], "end_time_unix_nano": times[1], "events": [], "links": [],
        "status": {"code": "STATUS_CODE_OK", "message": ""},
        "attributes": {key: json.dumps(value, ensure_ascii=False) for key, value in told.items()},
    })  # fmt: skip


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
