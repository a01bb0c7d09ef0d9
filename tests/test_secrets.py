"""No setting holds a key: what is refused, what passes, and that no sentence repeats what it refuses."""

import re
import shutil
from pathlib import Path

import pytest

from flows import config
from flows.config import ConfigError, load_config
from tasks.secrets import credentials_in, refuse_in_overrides, refuse_in_settings, secret_in
from tasks.tracking_runs import TrackingSettings

KEY = "planted-5d81e0-a6b2"  # in no provider's form
FORM = "sk-" + "planted0123456789abcd"
SLASHED = "/planted0+99a8b7/c6d5"


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_VENDORS_API_KEY", KEY)
    monkeypatch.setenv("MY_DB_PASSWORD", "short")
    monkeypatch.setenv("CLOUD_SECRET_KEY", SLASHED)


@pytest.mark.parametrize(
    "override",
    [
        f"vlm.model={KEY}",
        "vlm.model='${oc.env:SOME_VENDORS_API_KEY}'",
        f"vlm.api_key_env={FORM}",
        f"vlm.api_key={FORM}",
        "+vlm.api_key=short",
        "++images_api.token=short",
        f"'vlm.base_url=http://host/v1?key={KEY}'",
        "vlm.base_url='http://host/v1?key=short'",
        "vlm.base_url=http://me:short@host/v1",
        f"vlm.timeout_s={FORM}",
        f"generator.path=https://{KEY}@host/weights",
        "tracking.uri=https://short@host",
        "tracking.uri='postgresql://host/db?password=short'",
        "tracking.artifacts=s3://me:short@host/bucket",
        "runtime.address=ray://me:short@host:10001",
        "tracking.experiment='${oc.env:MY_DB_PASSWORD}'",
        "tracking.experiment='a-${ oc.env: MY_DB_PASSWORD, none }'",
        f"vlm.model={SLASHED}",
        "vlm.model='${oc.env:CLOUD_SECRET_KEY}'",
        "'vlm.base_url=http://host/v1#access_token=short'",
        FORM,
    ],
)
def test_a_key_in_an_override_is_refused_and_not_repeated(override: str) -> None:
    chosen = ["images_api=openai"] if "images_api" in override else ["vlm=openai_compatible"]
    with pytest.raises(ConfigError, match="keys come from the environment only") as told:
        load_config([*chosen, override])
    assert not any(secret in str(told.value) for secret in (KEY, FORM, SLASHED, "short"))
    assert told.value.__cause__ is None, "a traceback would show it"


@pytest.mark.parametrize(
    "override",
    [
        "vlm.api_key_env=SOME_VENDORS_API_KEY",
        "vlm.api_key_env=null",
        "vlm.tokens_per_minute=1000",
        "vlm.token_limit_field=max_completion_tokens",
        "tracking.uri='postgresql://me@host/db?sslmode=require'",
        "tracking.uri=sqlite:////some/where.db",
        "vlm.model=task-planted0123456789abcd",
        "vlm.model=owner/sk-model",
        "+dataset.class_names.key=key",
    ],
)
def test_what_is_no_key_passes(override: str) -> None:
    more = ["dataset.class_names={}"] if "class_names" in override else []
    assert load_config(["vlm=openai_compatible", *more, override])


def test_settings_from_a_file_are_refused_like_overrides() -> None:
    with pytest.raises(
        ValueError, match=r"^vlm\.model holds the value of the environment variable SOME_VENDORS"
    ):
        refuse_in_settings({"vlm": {"model": KEY, "max_side": 3}})
    with pytest.raises(ValueError, match=r"^names holds what looks like"):
        refuse_in_settings({"names": [["a", f"Bearer {FORM}"]]})
    refuse_in_settings({"vlm": {"model": "gpt-4o", "price": None}})


def test_an_interpolated_key_in_a_file_is_refused_whatever_its_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(config.CONFIGS, tmp_path / "configs")
    monkeypatch.setattr(config, "CONFIGS", tmp_path / "configs")
    file = tmp_path / "configs" / "vlm" / "openai_compatible.yaml"
    said = re.sub(r"(?m)^model:.*", 'model: "${oc.env:MY_DB_PASSWORD}"', file.read_text())
    file.write_text(said)
    with pytest.raises(ConfigError, match=r"vlm\.model holds an interpolation .* MY_DB_PASSWORD"):
        load_config(["vlm=openai_compatible"])


def test_short_values_and_paths_in_such_variables_are_not_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THEIR_TOKEN", "miniature")
    monkeypatch.setenv("SSH_KEY", str(tmp_path))
    refuse_in_overrides(["vlm=miniature", f"dataset.root={tmp_path}"])


def test_a_key_is_found_in_an_address_that_escapes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_VENDORS_API_KEY", "with/slash+plus=")
    assert secret_in("http://host/with%2Fslash%2Bplus%3D") is not None


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("https://host/v1", False),
        ("https://name@host", True),
        ("postgresql://name@host/db", False),
        ("postgresql://name:word@host/db", True),
        ("https://host/file?X-Amz-Signature=abc", True),
        ("https://host/file?token=", False),
        ("https://host/file#access_token=abc", True),
        ("https://host/file#part", False),
        ("http://[broken@", True),
        ("mlruns", False),
    ],
)
def test_credentials_of_addresses(address: str, found: bool) -> None:
    assert credentials_in(address) is found


def test_tracking_settings_by_themselves_take_no_password_either() -> None:
    known = load_config([]).tracking.model_dump()
    for name in ("uri", "ui", "artifacts"):
        with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD") as told:
            TrackingSettings(**{**known, name: "https://me:short@host"})
        assert "short" not in str(told.value)


@pytest.mark.parametrize(
    "name", ["../../x", "a/b", "", "=1+1", "-rf", ".hidden", "a\nb", "<b>x", "a|b", "a[red]"]
)
def test_the_names_that_folders_and_tables_get_are_plain(name: str) -> None:
    text = name.encode("unicode_escape").decode()
    with pytest.raises(ConfigError, match=r"dataset\.name"):
        load_config([f'dataset.name="{text}"'])


def test_names_of_any_script_and_with_blanks_are_plain() -> None:
    assert load_config(["dataset.name='Vögel 2.1 鳥'"]).run_key == "Vögel 2.1 鳥/guided/seed-0"
