"""The parts of a provider's replies that are looked at, and nothing taken on trust.

The official library builds its objects without checking them: a reply of another form would come to light as a foreign
error somewhere later. So the bytes are read here, by what a client needs; the rest is ignored. What is told of tokens
costs no answer: where it is missing or absurd, it counts as not told, which is 0. Nor does a character that is none.
"""

import json
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from tasks.records import Usage
from tasks.text import readable
from tasks.vlm.failures import BrokenReplyError

MOST_TOKENS = 10**9


def _or_none(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    try:
        return handler(value)
    except ValidationError:
        return None


def _as_text(value: Any) -> Any:
    return readable(value) if isinstance(value, str) else value


Text = Annotated[str, BeforeValidator(_as_text)]


class _Form(BaseModel):
    """What a reply should be; ``noun`` is what a complaint calls it."""

    noun: ClassVar[str]


Count = Annotated[int | None, Field(ge=0, le=MOST_TOKENS), WrapValidator(_or_none)]


class Tokens(BaseModel):
    """What one answer took."""

    read: Count = Field(None, validation_alias=AliasChoices("prompt_tokens", "input_tokens"))
    written: Count = Field(None, validation_alias=AliasChoices("completion_tokens", "output_tokens"))


class _Told(_Form):
    usage: Annotated[Tokens | None, WrapValidator(_or_none)] = None

    @property
    def used(self) -> Usage:
        """Of this one answer, without its cost."""
        tokens = self.usage or Tokens()
        return Usage(calls=1, prompt_tokens=tokens.read or 0, completion_tokens=tokens.written or 0)


class Said(BaseModel):
    """The assistant's turn, or why there is none."""

    content: Text | None = None
    refusal: Text | None = None


class Choice(BaseModel):
    """One answer."""

    message: Said


class Completion(_Told):
    """A chat completion: one answer, since one was asked for."""

    noun: ClassVar[str] = "chat completion"

    choices: tuple[Choice]
    model: Annotated[Text | None, WrapValidator(_or_none)] = None


class DrawnImage(BaseModel):
    """An image, or else its address."""

    b64_json: str | None = None


class Images(_Told):
    """What an images endpoint sends: one image, since one was asked for."""

    noun: ClassVar[str] = "image"

    data: tuple[DrawnImage]


class ServedModel(BaseModel):
    """A model that can be asked for."""

    id: str


class ModelList(_Form):
    """What a server lists."""

    noun: ClassVar[str] = "list of models"

    data: list[ServedModel] | None = None


class _Error(BaseModel):
    message: Text


class _Failure(BaseModel):
    error: _Error | Text


Form = TypeVar("Form", bound=_Form)


def understood(form: type[Form], data: bytes) -> Form:
    """Read a reply.

    Args:
        form: what it should be.
        data: all of it.

    Raises:
        BrokenReplyError: it is something else; what it says of an error is told.
    """
    try:
        said = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BrokenReplyError(f"something that is no {form.noun} ({error})") from None
    try:
        return form.model_validate(said)
    except ValidationError as error:
        raise BrokenReplyError(_complaint(form.noun, said, error)) from None


def _complaint(noun: str, reply: object, error: ValidationError) -> str:
    try:
        said = _Failure.model_validate(reply).error
    except ValidationError:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        return f"something that is no {noun} ({place}{': ' if place else ''}{first['msg']})"
    return f"an error in place of an answer: {said if isinstance(said, str) else said.message}"
