"""The house rules, read off the source: imports go one way, functions stay short, libraries print nothing."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(p for folder in ("flows", "tasks") for p in (ROOT / folder).rglob("*.py"))
VERBS = ("train_classifier", "evaluate", "mine_failures", "vlm_compare", "tune_lora", "regenerate")
ONLY_IN = {
    "prefect": ("flows/", *(f"tasks/{verb}.py" for verb in VERBS)),
    "mlflow": ("tasks/tracking_runs.py", "tasks/tracking_traces.py", "tasks/tracking.py"),
    "openai": ("tasks/vlm/endpoint.py", "tasks/vlm/failures.py"),
    "hydra": ("flows/config.py",),
    "dvc": ("tasks/versions.py",),
    "dvc_data": ("tasks/versions.py",),
    "ray": ("flows/ray_shards.py",),
    "prefect_ray": ("flows/ray_shards.py",),
}
NOUN_EDGES = {("diffusion", "similarity"), ("learners", "classification")}
NOUNS = ("classification", "datasets", "diffusion", "learners", "miniature", "similarity", "vlm")


def trees() -> Iterator[tuple[str, ast.Module]]:
    for path in SOURCES:
        yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text("utf-8"))


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("package", sorted(ONLY_IN))
def test_a_package_is_imported_only_where_it_belongs(package: str) -> None:
    users = [name for name, tree in trees() if any(i.split(".")[0] == package for i in imports(tree))]
    assert users, f"nothing imports {package}"
    assert [u for u in users if not u.startswith(ONLY_IN[package])] == []


def test_imports_go_one_way() -> None:
    wrong = []
    for name, tree in trees():
        own = name.split("/")[1] if name.count("/") > 1 else None
        for module in imports(tree):
            if name.startswith("tasks/") and module.split(".")[0] == "flows":
                wrong.append((name, module))
            if not module.startswith("tasks.") or name.startswith("flows/"):
                continue
            target = module.split(".")[1]
            if own in NOUNS and target in VERBS:
                wrong.append((name, module))
            if own in NOUNS and target in NOUNS and own != target and (own, target) not in NOUN_EDGES:
                wrong.append((name, module))
    assert wrong == []


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef, int]]:
    for name, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield name, node, (node.end_lineno or 0) - node.lineno + 1


def test_functions_are_short_and_annotated() -> None:
    lengths = sorted(length for _, _, length in functions())
    assert [(n, f.name, length) for n, f, length in functions() if length > 80] == []
    assert lengths[len(lengths) // 2] <= 12
    assert lengths[int(len(lengths) * 0.9)] <= 40
    assert [(n, f.name) for n, f, _ in functions() if f.returns is None] == []


def test_every_module_and_public_name_says_what_it_is() -> None:
    silent = []
    for name, tree in trees():
        if not name.endswith("__init__.py") and not ast.get_docstring(tree):
            silent.append(name)
        for node in tree.body:
            if (
                isinstance(node, ast.FunctionDef | ast.ClassDef)
                and node.name[0] != "_"
                and not ast.get_docstring(node)
            ):
                silent.append(f"{name}:{node.name}")
    assert silent == []


def test_errors_are_caught_by_name_and_libraries_do_not_print() -> None:
    wrong = []
    for name, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                wrong.append(f"{name}:{node.lineno} bare except")
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called == "print" and not name.endswith(
                ("__main__.py", "commands.py", "pretrain.py", "quality.py", "vlm_server.py", "warm_server.py")
            ):
                wrong.append(f"{name}:{node.lineno} print")
    assert wrong == []


def test_verbs_are_there_and_say_what_they_read_return_and_write() -> None:
    for verb in VERBS:
        doc = ast.get_docstring(ast.parse((ROOT / "tasks" / f"{verb}.py").read_text("utf-8"))) or ""
        assert all(word in doc for word in ("Reads:", "Returns:", "Writes:", "paper")), verb


def test_the_project_names_no_path_of_a_machine() -> None:
    marks = ("/ho" + "me/", "/wo" + "rk/", "/ro" + "ot/", "file" + ":///")
    text_files = [
        p
        for p in ROOT.rglob("*")
        if p.suffix in {".py", ".md", ".toml", ".yaml", ".txt", ".jinja", ".css", ".js"}
        and not any(part in {".venv", ".git", ".fscil", "runs", "reports", "data"} for part in p.parts)
    ]
    assert [p.name for p in text_files if any(mark in p.read_text("utf-8") for mark in marks)] == []


SLOW_TO_IMPORT = ("diffusers", "peft", "transformers", "mlflow")
MAY_WAIT = ("tasks/miniature/",)


def at_module_level(tree: ast.Module) -> Iterator[str]:
    yield from imports(ast.Module(body=[n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]))


def test_a_command_does_not_wait_for_packages_that_it_may_not_need() -> None:
    """Seconds for each: they are imported by the function that uses them."""
    found = [
        (path, name)
        for path, tree in trees()
        for name in at_module_level(tree)
        if name.split(".")[0] in SLOW_TO_IMPORT and not path.startswith(MAY_WAIT)
    ]
    assert found == []
