"""Data of others are read, never run: what no file of the project may call, tests included, read off the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(p for folder in ("flows", "tasks", "tests") for p in (ROOT / folder).rglob("*.py"))

PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}
NEVER = {
    "eval", "exec", "__import__", "os.system", "os.popen", "tempfile.mktemp",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.unsafe_load_all",
    "torch.hub.load", "torch.jit.load", "shutil.unpack_archive", "pd.read_pickle", "pandas.read_pickle",
}  # fmt: skip
WITHOUT_WEIGHTS = ("Tokenizer", "Processor", "Config", "Scheduler")  # what from_pretrained reads as JSON


def imported(tree: ast.Module) -> dict[str, str]:
    """What each name that an import makes stands for."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {name.asname: name.name for name in node.names if name.asname}
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            known |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
    return known


def faults(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and reason of each thing that could run or unpack what others made."""
    known = imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            if found := PICKLES & {name.split(".")[0] for name in names}:
                yield node.lineno, f"imports {found.pop()}"
        if isinstance(node, ast.Call) and (why := _call(node, known)) is not None:
            yield node.lineno, why


def _call(node: ast.Call, known: dict[str, str]) -> str | None:
    begin, dot, rest = ast.unparse(node.func).partition(".")
    called = known.get(begin, begin) + dot + rest
    given = {k.arg: ast.unparse(k.value) for k in node.keywords}
    first, last = called.split(".")[0], called.rpartition(".")[2]
    if called in NEVER:
        return called
    if called == "torch.load" and given.get("weights_only") != "True":
        return "torch.load without weights_only=True"
    if last == "load" and first in ("np", "numpy") and given.get("allow_pickle", "False") != "False":
        return "np.load with pickles"
    if (
        last in ("from_pretrained", "from_single_file", "from_config")
        and given.get("trust_remote_code") == "True"
    ):
        return "runs the code that comes with a model"
    if last == "from_pretrained" and not called.rpartition(".")[0].endswith(WITHOUT_WEIGHTS):
        return (
            None if given.get("use_safetensors") == "True" else "from_pretrained without use_safetensors=True"
        )
    if last in ("extractall", "extract") and first in (
        "tar",
        "zip",
        "packed",
        "archive",
        "tarfile",
        "zipfile",
    ):
        return "unpacks an archive without tasks.datasets.unpack"
    if given.get("shell") == "True" or "custom_pipeline" in given or given.get("verify") == "False":
        return "shell=True, custom_pipeline or verify=False"
    return None


def test_nothing_unpickles_evaluates_or_runs_what_others_made() -> None:
    assert len(SOURCES) > 200
    wrong = [
        f"{path.relative_to(ROOT)}:{line} {why}"
        for path in SOURCES
        for line, why in faults(ast.parse(path.read_text("utf-8")))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "import torch as t; t.load(path)",
        "from torch import load; load(path)",
        "from yaml import load as read; read(text, Loader)",
        "from os import system; system(text)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "AutoModel.from_pretrained(name)",
        "AutoTokenizer.from_pretrained(name, trust_remote_code=True)",
        "tar.extractall(folder)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_the_ban_sees(source: str) -> None:
    assert list(faults(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "torch.load(path, weights_only=True)",
        "np.load(path)",
        "yaml.safe_load(text)",
        "json.load(file)",
        "AutoModel.from_pretrained(name, use_safetensors=True)",
        "CLIPTokenizer.from_pretrained(folder)",
    ],
)
def test_the_ban_lets_pass(source: str) -> None:
    assert list(faults(ast.parse(source))) == []
