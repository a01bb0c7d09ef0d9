"""kill -9 while answers come in, then the same again: what was kept is not asked for, hence not paid for, twice."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from fake_vlm import SETTINGS
from provider import Act, providing

from tasks.vlm.cache import CachedClient
from tasks.vlm.client import Message, Request, VlmSettings
from tasks.vlm.openai_client import OpenAiClient

COUNT, AT_ONCE = 40, 4
CHILD = """
import sys
from pathlib import Path
sys.path[:0] = [{here!r}, {root!r}]
from test_killed import client, questions
client({url!r}, Path({folder!r})).complete_all(questions())
"""


def questions() -> list[Request]:
    return [Request(messages=(Message(role="user", text=f"question {n}"),)) for n in range(COUNT)]


def client(url: str, folder: Path) -> CachedClient:
    settings = VlmSettings(
        **{**SETTINGS.model_dump(), "base_url": url, "concurrency": AT_ONCE, "timeout_s": 60}
    )
    return CachedClient(OpenAiClient(settings, ledger=folder / "paid.jsonl"), folder / "vlm")


def test_a_killed_process_pays_again_only_for_what_was_under_way(tmp_path: Path) -> None:
    here = Path(__file__).resolve().parent
    with providing(*[Act(hang=0.05)] * COUNT) as provider:
        code = CHILD.format(
            here=str(here), root=str(here.parent.parent), url=provider.base_url, folder=str(tmp_path)
        )
        child = subprocess.Popen([sys.executable, "-c", code])
        while child.poll() is None and len(list((tmp_path / "vlm").rglob("*.json"))) < 12:
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        kept = len(list((tmp_path / "vlm").rglob("*.json")))
        asked = len(provider.sent)
        replies = client(provider.base_url, tmp_path).complete_all(questions())
        assert [reply.text for reply in replies] == [f"re: question {n}" for n in range(COUNT)]
        assert len(provider.sent) - asked == COUNT - kept
        assert sum(provider.billed.values()) <= COUNT + AT_ONCE
    assert COUNT - 1 <= len((tmp_path / "paid.jsonl").read_text().splitlines()) <= COUNT
