"""What requests look like.  Unknown keys are errors, and so are values that nothing here acts on: nothing is silently ignored.

OpenAI's own fields come first, with its defaults; the names and limits of the others are errata's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Text = Annotated[str, Field(min_length=1, max_length=200_000, pattern=r"\S")]
Occurrence = Annotated[int, Field(ge=-1_000, le=1_000, description="which of the subject's places in the prompt: 1 the first, -1 the last")]
Subject = Annotated[str, Field(min_length=1, max_length=500, pattern=r"\S")]
Name = Annotated[str, Field(min_length=1, max_length=500, examples=["live"])]
Zero = Annotated[float, Field(ge=0, le=0, description="not supported: only 0")]
Stops = Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=4)]
_MOST_PROMPTS = 64


class StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(StrictModel):
    include_usage: bool = False


class Sampled(StrictModel):
    """What both kinds of answers share.  ``temperature`` 0 is greedy."""

    model: Name
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    temperature: float | None = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    n: int | None = Field(1, ge=1, le=128)
    stop: Annotated[str, Field(min_length=1, max_length=200)] | Stops | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    frequency_penalty: Zero | None = 0
    presence_penalty: Zero | None = 0
    logit_bias: Annotated[dict[str, float], Field(max_length=0, description="not supported")] | None = None
    user: Annotated[str, Field(max_length=1000)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionRequest(Sampled):
    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=_MOST_PROMPTS)]
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: Literal[False] | None = False
    suffix: None = None
    best_of: Annotated[int, Field(ge=1, le=1, description="not supported: only 1")] | None = None

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class Part(StrictModel):
    type: Literal["text"]
    text: str = Field(max_length=200_000)


class Message(StrictModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, Field(max_length=200_000)] | Annotated[list[Part], Field(min_length=1, max_length=64)]
    name: Annotated[str, Field(max_length=200)] | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class TextFormat(StrictModel):
    type: Literal["text"]


class ChatRequest(Sampled):
    messages: Annotated[list[Message], Field(min_length=1, max_length=512)]
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0, description="not supported")] | None = None


# -- edits -----------------------------------------------------------------------------------------------------


class Fact(StrictModel):
    """One fact to write: see `errata.request.EditRequest`."""

    prompt: Text
    target: Text
    subject: Text | None = None
    occurrence: Occurrence = 1
    join: Literal["auto", "space", "none"] = "auto"
    old: Text | None = None
    paraphrases: Annotated[list[Text], Field(max_length=64)] = []
    unrelated: Annotated[list[Annotated[list[Text], Field(min_length=2, max_length=2)]], Field(max_length=64)] = []
    aliases: Annotated[list[Text], Field(max_length=64)] = []


FACT = ("prompt", "target", "subject", "occurrence", "join", "old", "paraphrases", "unrelated", "aliases")


class EditPost(StrictModel):
    """``prompt`` and ``target`` (and what else a fact has), or ``requests`` for many."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "oneOf": [
                {"required": ["prompt", "target"], "not": {"required": ["requests"]}},
                {"required": ["requests"], "properties": dict.fromkeys(FACT, False)},
            ]
        },
    )

    prompt: Text | None = None
    target: Text | None = None
    subject: Text | None = None
    occurrence: Occurrence = 1
    join: Literal["auto", "space", "none"] = "auto"
    old: Text | None = None
    paraphrases: Annotated[list[Text], Field(max_length=64)] = []
    unrelated: Annotated[list[Annotated[list[Text], Field(min_length=2, max_length=2)]], Field(max_length=64)] = []
    aliases: Annotated[list[Text], Field(max_length=64)] = []
    requests: Annotated[list[Fact], Field(min_length=1, fail_fast=True)] | None = None
    method: Annotated[str, Field(max_length=64)] = "baft"
    settings: dict[str, Any] = {}
    mode: Literal["single", "batched", "continual"] = "single"
    batch_size: int | None = Field(None, ge=1, le=10_000)
    author: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    reason: Annotated[str, Field(max_length=10_000)] = ""
    force: bool = False

    @model_validator(mode="after")
    def one_or_many(self) -> EditPost:
        single = [name for name in FACT if name in self.model_fields_set]
        if self.requests is not None and single:
            raise ValueError(f"{single[0]} and requests exclude each other; put the fact into requests")
        if self.requests is None and (self.prompt is None or self.target is None):
            raise ValueError("nothing to edit: give prompt and target, or requests")
        return self

    @property
    def facts(self) -> list[Fact]:
        if self.requests is not None:
            return self.requests
        return [Fact.model_validate({name: getattr(self, name) for name in FACT if name in self.model_fields_set})]


# -- questions -------------------------------------------------------------------------------------------------


class Pair(StrictModel):
    old: Text | None = None
    new: Text | None = None


class CompareRequest(StrictModel):
    prompts: Annotated[list[Text], Field(min_length=1, max_length=_MOST_PROMPTS)]
    before: Name = "base"
    after: Name = "live"
    max_tokens: int = Field(12, ge=1, le=256)
    answers: Annotated[list[Pair | None], Field(max_length=_MOST_PROMPTS, description="null, or one for each prompt")] | None = None

    @model_validator(mode="after")
    def one_each(self) -> CompareRequest:
        if self.answers is not None and len(self.answers) != len(self.prompts):
            raise ValueError(f"{len(self.answers)} answers for {len(self.prompts)} prompts; give one for each, or null")
        return self


class BlameRequest(StrictModel):
    prompt: Text
    max_tokens: int = Field(12, ge=1, le=256)


class NoFields(StrictModel):
    pass


class NeighboursRequest(StrictModel):
    prompt: Text
    subject: Subject
    target: Text | None = None
    count: int = Field(6, ge=1, le=64)
    paraphrases: Annotated[list[Text], Field(max_length=64)] = []


class TraceRequest(StrictModel):
    prompt: Text
    subject: Subject
    target: Text | None = None
    model: Literal["base"] = "base"


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """OpenAI's shape of an error."""

    error: ErrorBody
