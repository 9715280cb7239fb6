"""Request bodies: what each field means, and which fields are refused.

Every documented field is either applied, or accepted only with the value that asks for nothing
(`NEUTRAL`). Anything else is an error: a parameter must not be accepted and then ignored. The one
exception are OpenAI's identifiers of users and requests (`user`, `metadata`, `safety_identifier`,
`prompt_cache_key`): they are labels, and change no answer at OpenAI either.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic

from jaxserve.request import SamplingParams
from jaxserve.server.errors import bad_request

MAX_CHOICES = 128  # OpenAI's bound on `n`
COMPLETIONS_MAX_TOKENS = 16  # OpenAI's default for /v1/completions
GENERATE_MAX_TOKENS = 128  # SGLang's default for /generate

# Field -> the values that ask for nothing; any other value is refused.
_NEUTRAL_SAMPLING = {
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "min_tokens": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "include_stop_str_in_output": (False,),
    "no_stop_trim": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
}
NEUTRAL: Mapping[str, Mapping[str, tuple[Any, ...]]] = types.MappingProxyType(
    {
        "chat": {
            **_NEUTRAL_SAMPLING,
            "audio": (),
            "function_call": ("none", "auto"),
            "functions": ([],),
            "logprobs": (False,),
            "modalities": (["text"],),
            "moderation": (),
            "parallel_tool_calls": (True, False),  # says how to call tools, and there are none
            "prediction": (),
            "prompt_cache_options": (),
            "prompt_cache_retention": (),
            "reasoning_effort": (),
            "response_format": ({"type": "text"},),
            "service_tier": ("auto", "default"),
            "store": (False,),
            "tool_choice": ("none", "auto"),
            "tools": ([],),
            "top_logprobs": (0,),
            "verbosity": ("medium",),
            "web_search_options": (),
        },
        "completions": {
            **_NEUTRAL_SAMPLING,
            "best_of": (1,),
            "echo": (False,),
            "logprobs": (),
            "suffix": ("",),
        },
        "generate": {
            "image_data": ([],),
            "audio_data": ([],),
            "video_data": ([],),
            "input_embeds": (),
            "logprob_start_len": (-1,),
            "lora_path": (),
            "return_hidden_states": (False,),
            "return_logprob": (False,),
            "return_text_in_logprobs": (True, False),  # says how to return logprobs
            "token_ids_logprob": (),
            "top_logprobs_num": (0,),
        },
        "generate.sampling_params": {
            "custom_params": (),
            "ebnf": (),
            "frequency_penalty": (0,),
            "json_schema": (),
            "logit_bias": ({},),
            "min_new_tokens": (0,),
            "no_stop_trim": (False,),
            "presence_penalty": (0,),
            "regex": (),
            "repetition_penalty": (1,),
            "skip_special_tokens": (True,),
            "spaces_between_special_tokens": (True,),
            "stop_regex": (),
            "structural_tag": (),
        },
    }
)

TokenIds = list[int]
Positive = Annotated[int, pydantic.Field(ge=1)]
NumChoices = Annotated[int, pydantic.Field(ge=1, le=MAX_CHOICES)]


class Body(pydantic.BaseModel):
    """No unknown fields, no conversions between JSON types, no NaN."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TextPart(Body):
    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """A message of the conversation; fields that only tools or audio need must be empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], pydantic.Field(max_length=0)] | None = None
    tool_calls: Annotated[list[Any], pydantic.Field(max_length=0)] | None = None

    def for_template(self) -> dict[str, str]:
        """Return it as templates know it: parts joined by line breaks, developer as system."""
        content = self.content
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": content}
        if self.name is not None:
            message["name"] = self.name
        return message


class _OpenAIBody(Body):
    """Fields that both OpenAI routes apply; None means "not given", as in OpenAI's API."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    n: NumChoices | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    frequency_penalty: Any = None
    logit_bias: Any = None
    logprobs: Any = None
    min_tokens: Any = None
    presence_penalty: Any = None
    repetition_penalty: Any = None
    include_stop_str_in_output: Any = None
    no_stop_trim: Any = None
    skip_special_tokens: Any = None
    spaces_between_special_tokens: Any = None

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(
        self, defaults: Mapping[str, float | int], max_tokens: int | None
    ) -> SamplingParams:
        """Return the sampling parameters; `defaults` are the checkpoint's, by field name."""
        return make_sampling(
            defaults,
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.seed,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
        )

    def _check_stream_options(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise bad_request(
                "stream_options is only allowed with stream=true.", param="stream_options"
            )


class CompletionBody(_OpenAIBody):
    """POST /v1/completions."""

    prompt: str | list[str] | TokenIds | list[TokenIds]
    max_tokens: Positive | None = None
    best_of: Any = None
    echo: Any = None
    suffix: Any = None

    def check(self) -> None:
        """Raise APIError for a field that is not applied and not neutral."""
        refuse_unless_neutral(self, "completions")
        self._check_stream_options()
        if not self.prompt and self.prompt != "":
            raise bad_request("prompt is an empty list; send at least one.", param="prompt")

    @property
    def prompts(self) -> list[str | TokenIds]:
        return as_list_of_prompts(self.prompt)


class ChatBody(_OpenAIBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], pydantic.Field(min_length=1)]
    max_completion_tokens: Positive | None = None
    max_tokens: Positive | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None

    audio: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    moderation: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    reasoning_effort: Any = None
    response_format: Any = None
    service_tier: Any = None
    store: Any = None
    tool_choice: Any = None
    tools: Any = None
    top_logprobs: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    def check(self) -> None:
        """Raise APIError for a field that is not applied and not neutral."""
        refuse_unless_neutral(self, "chat")
        self._check_stream_options()
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise bad_request(
                f"max_tokens={self.max_tokens} and max_completion_tokens="
                f"{self.max_completion_tokens} contradict each other; send one of them.",
                param="max_tokens",
            )

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class GenerateSampling(Body):
    """`sampling_params` of POST /generate, under SGLang's names."""

    max_new_tokens: Positive | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    sampling_seed: int | None = None
    n: NumChoices | None = None

    custom_params: Any = None
    ebnf: Any = None
    frequency_penalty: Any = None
    json_schema: Any = None
    logit_bias: Any = None
    min_new_tokens: Any = None
    no_stop_trim: Any = None
    presence_penalty: Any = None
    regex: Any = None
    repetition_penalty: Any = None
    skip_special_tokens: Any = None
    spaces_between_special_tokens: Any = None
    stop_regex: Any = None
    structural_tag: Any = None

    def sampling(
        self, defaults: Mapping[str, float | int], max_tokens: int | None
    ) -> SamplingParams:
        """Return the sampling parameters; `defaults` are the checkpoint's, by field name."""
        return make_sampling(
            defaults,
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.sampling_seed,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
        )


class GenerateBody(Body):
    """POST /generate, SGLang's native request: one prompt or a list of them."""

    text: str | list[str] | None = None
    input_ids: TokenIds | list[TokenIds] | None = None
    sampling_params: GenerateSampling | list[GenerateSampling] | None = None
    rid: str | list[str] | None = None
    stream: bool | None = None

    image_data: Any = None
    audio_data: Any = None
    video_data: Any = None
    input_embeds: Any = None
    logprob_start_len: Any = None
    lora_path: Any = None
    return_hidden_states: Any = None
    return_logprob: Any = None
    return_text_in_logprobs: Any = None
    token_ids_logprob: Any = None
    top_logprobs_num: Any = None

    def check(self) -> None:
        """Raise APIError for fields that are not neutral, or do not fit together."""
        refuse_unless_neutral(self, "generate")
        if (self.text is None) == (self.input_ids is None):
            raise bad_request("send either text or input_ids.", param="text")
        num_prompts = len(self.prompts)
        if num_prompts == 0:
            raise bad_request("the list of prompts is empty; send at least one.", param="text")
        for params in self.sampling_params_list:
            refuse_unless_neutral(params, "generate.sampling_params")
        for field in ("sampling_params", "rid"):
            value = getattr(self, field)
            if isinstance(value, list) and (not self.is_batch or len(value) != num_prompts):
                raise bad_request(
                    f"{field} is a list of {len(value)}, but there are {num_prompts} prompts"
                    f"{'' if self.is_batch else ' (not in a list)'}; send one for each prompt.",
                    param=field,
                )

    @property
    def is_batch(self) -> bool:
        given = self.text if self.text is not None else self.input_ids
        return isinstance(given, list) and (not given or not isinstance(given[0], int))

    @property
    def prompts(self) -> list[str | TokenIds]:
        given = self.text if self.text is not None else self.input_ids
        if given == []:
            return []
        return as_list_of_prompts(given)

    @property
    def sampling_params_list(self) -> list[GenerateSampling]:
        """One per prompt."""
        if isinstance(self.sampling_params, list):
            return self.sampling_params
        return [self.sampling_params or GenerateSampling()] * len(self.prompts)


class AbortBody(Body):
    """POST /abort_request."""

    rid: str | None = None
    abort_all: bool = False


def make_sampling(
    defaults: Mapping[str, float | int],
    *,
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None,
    seed: int | None,
    stop: str | list[str] | None,
    stop_token_ids: list[int] | None,
    ignore_eos: bool | None,
) -> SamplingParams:
    """Fill what a request leaves open: first from the checkpoint, then with OpenAI's defaults.

    Raises InvalidRequest naming a value out of range.
    """
    asked = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    chosen = {**defaults, **{name: value for name, value in asked.items() if value is not None}}
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=float(chosen.get("temperature", 1.0)),
        top_p=float(chosen.get("top_p", 1.0)),
        top_k=int(chosen.get("top_k", 0)),
        min_p=float(chosen.get("min_p", 0.0)),
        seed=seed,
        stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
        stop_token_ids=tuple(stop_token_ids or ()),
        ignore_eos=bool(ignore_eos),
    )


def refuse_unless_neutral(body: Body, route: str) -> None:
    """Raise APIError for the first field that asks for something this server does not do."""
    for field, neutral in NEUTRAL[route].items():
        value = getattr(body, field)
        if value is None or any(
            value == allowed and isinstance(value, bool) == isinstance(allowed, bool)
            for allowed in neutral
        ):
            continue
        allowed = " or ".join(repr(value) for value in (*neutral, None))
        raise bad_request(
            f"{field}={value!r} is not supported; leave it out, or send {allowed}.",
            param=field,
            code="unsupported_parameter",
        )


def as_list_of_prompts(
    prompt: str | list[str] | TokenIds | list[TokenIds] | None,
) -> list[str | TokenIds]:
    """Return one entry per prompt: text or token ids."""
    if isinstance(prompt, str):
        return [prompt]
    assert prompt, "the caller has refused empty lists"
    if isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)
