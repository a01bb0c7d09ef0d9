"""What the README, the Makefile, data.dvc and the constraints promise is true of the code."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from flows.__main__ import expand
from flows.config import load_config
from flows.reproduce import overrides_of, read_profile
from tasks.datasets.digits import write_digits
from tasks.store import digest_of
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text("utf-8")
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
    if line.split("#")[0].strip()
]


def test_the_readme_has_commands() -> None:
    assert "make demo" in COMMANDS
    assert "make test" in COMMANDS
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("command", sorted({c for c in COMMANDS if c.startswith("make ")}))
def test_every_make_target_of_the_readme_exists(command: str) -> None:
    done = subprocess.run(["make", "-n", *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if "fscil dataset=" in c])
def test_every_experiment_of_the_readme_composes(command: str) -> None:
    words = shlex.split(command)
    for combination in expand(words[words.index(next(w for w in words if w.endswith("fscil"))) + 1 :]):
        assert load_config(combination).run_key


@pytest.mark.parametrize("command", [c for c in COMMANDS if "fscil " in c and "dataset=" not in c])
def test_every_other_command_of_the_readme_is_one(command: str) -> None:
    import flows.__main__ as cli

    word = shlex.split(command)[1]
    assert word in (cli.__doc__ or "")


def test_make_help_lists_every_target_with_one_line() -> None:
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    phony = re.findall(r"^\.PHONY: (\S+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert sorted(line.split()[0] for line in shown) == sorted(phony)
    assert all(len(line.split()) > 2 for line in shown)


def test_data_dvc_names_what_is_written_on_any_machine(tmp_path: Path) -> None:
    write_digits(tmp_path / "data" / "digits")
    (out,) = yaml.safe_load((ROOT / "data.dvc").read_text())["outs"]
    assert digest_of(tmp_path / "data") == out["md5"]
    files = [p for p in (tmp_path / "data").rglob("*") if p.is_file()]
    assert (len(files), sum(p.stat().st_size for p in files)) == (out["nfiles"], out["size"])


def test_constraints_satisfy_every_requirement() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    wanted = project["dependencies"] + [
        r for extra in project["optional-dependencies"].values() for r in extra
    ]
    for text in wanted:
        requirement = Requirement(text)
        version = pins.get(requirement.name.lower().replace("_", "-"))
        assert version is not None, f"{text} is not pinned"
        assert requirement.specifier.contains(version), f"{text} is pinned to {version}"


def test_dvc_stages_name_what_exists() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert stages["pretrain"]["frozen"] is True
    for stage in stages.values():
        for path in stage.get("deps", []):
            assert path.startswith("reports/") or (ROOT / path).exists(), path
    keys = {name for stage in stages.values() for name in stage.get("params", [])}
    axes = {value.strip("${}") for stage in stages.values() for value in stage.get("matrix", {}).values()}
    assert keys | axes <= set(yaml.safe_load((ROOT / "params.yaml").read_text()))


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "profile").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_experiment_of_a_profile_composes(path: Path) -> None:
    profile = read_profile(path)
    assert profile.profile == path.stem
    for dataset in profile.datasets:
        for method in profile.methods:
            config = load_config([*overrides_of(profile), f"dataset={dataset}", f"method={method}"])
            assert config.runtime.replace


def test_params_yaml_is_a_profile_as_it_is_in_configs() -> None:
    here = ROOT / "params.yaml"
    assert here.read_bytes() == (ROOT / "configs" / "profile" / "miniature.yaml").read_bytes()
