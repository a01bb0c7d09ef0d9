"""Keys stand in the environment and nowhere else: what a setting may not hold, and how a key is recognised.

A setting is written into records, MLflow, Prefect and DVC, and an override into the shell's history. So one that
holds a key is refused, by a sentence that does not repeat it. Taken for a key are: the value of an environment
variable whose name says that it is one, an interpolation of such a variable, a text in a provider's form, and what an
address says beside host and path. A key that has neither form nor variable cannot be recognised.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

_WORDS = r"(?:key|token|secret|password|passwd|pwd|passphrase|credentials?|auth|auth_string|signature|sig)$"
_VARIABLE = re.compile(_WORDS, re.I)
_SETTING = re.compile(rf"(?:^|[_-]|api){_WORDS}", re.I)
_FORM = re.compile(
    r"(?<![A-Za-z0-9])(?:sk-[\w-]{16,}|hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|"
    r"glpat-[\w-]{16,}|AKIA[0-9A-Z]{16}|AIza[\w-]{30,}|xox[abprs]-[\w-]{10,}|pn[ub]_[A-Za-z0-9]{20,}|"
    r"eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+)"
)
_INTERPOLATION = re.compile(r"\$\{\s*oc\.env\s*:\s*['\"]?([^'\",}\s]+)")
_ADDRESS = re.compile(r"[A-Za-z][\w+.-]*://[^\s'\",\]}]+")
_SHORTEST = 12
"""Values of fewer characters are not looked for (``secret`` and ``password`` stand in honest texts), but their variables
may not be interpolated either."""

REMEDY = (
    "keys come from the environment only: export it under a variable (vlm.api_key_env and images_api.api_key_env "
    "name theirs; MLFLOW_TRACKING_PASSWORD, HF_TOKEN, PREFECT_API_KEY and the like are read by name), and withdraw "
    "it if it was shown to others"
)


def secret_values(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The keys of the environment, by the names of their variables."""
    held = os.environ if environment is None else environment
    return {
        name: value.strip()
        for name, value in held.items()
        if _VARIABLE.search(name) and len(value.strip()) >= _SHORTEST and not _is_path(value.strip())
    }


def _is_path(value: str) -> bool:
    """Whether a value names a file that is there, as ``SSL_KEY=/etc/ssl/key.pem`` does; a key may begin with a slash."""
    try:
        return value.startswith(("/", "~")) and Path(value).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def secret_in(text: str) -> str | None:
    """What of a text is secret, in words that do not repeat it; None where nothing is."""
    for name in _INTERPOLATION.findall(text):
        if _VARIABLE.search(name):
            return f"an interpolation of the environment variable {name}"
    for name, value in secret_values().items():
        if value in text or value in unquote(text):
            return f"the value of the environment variable {name}"
    if _FORM.search(text):
        return "what looks like a provider's key"
    if any(credentials_in(address) for address in _ADDRESS.findall(text)):
        return "an address with a password or key in it"
    return None


def named_so(setting: str) -> bool:
    """Whether a setting's name says that it holds a key, as ``vlm.api_key`` does and ``vlm.api_key_env`` does not."""
    return _SETTING.search(setting.rpartition(".")[2]) is not None


def credentials_in(address: str) -> bool:
    """Whether an address says more than where: a password, or over HTTP any name; or a key in its query or fragment."""
    try:
        parts = urlsplit(address)
        user, password = parts.username, parts.password
    except ValueError:
        return "@" in address
    if password is not None or (user is not None and parts.scheme in ("http", "https")):
        return True
    said = parse_qsl(parts.query) + parse_qsl(parts.fragment)
    return any(named_so(name) and value for name, value in said)


def refuse_in_overrides(overrides: Sequence[str]) -> None:
    """Refuse ``name=value`` texts that hold a key.

    Raises:
        ValueError: one does; the message names the setting and not the value.
    """
    for override in overrides:
        name, equals, value = override.lstrip("+~'\"").partition("=")
        if not equals:
            name, value = "an argument", override
        named = "class_names" not in name and named_so(name) and value not in ("", "null")
        if (found := "a key" if named else secret_in(value)) is not None:
            raise ValueError(f"{name}{equals} holds {found}; {REMEDY}")


def refuse_in_settings(settings: Mapping[str, object]) -> None:
    """Refuse composed settings that hold a key, wherever it came from (a file, an interpolation).

    Raises:
        ValueError: one does; the message names the setting and not the value.
    """
    for name, text in _texts(settings, ""):
        if (found := secret_in(text)) is not None:
            raise ValueError(f"{name} holds {found}; {REMEDY}")


def _texts(value: object, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(inner, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner, name)
    elif value is not None:
        yield name, str(value)
