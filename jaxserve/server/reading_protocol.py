"""Request bodies of the routes that read texts: embeddings, scores, ranks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic

from jaxserve.server.errors import bad_request
from jaxserve.server.protocol import Body, ChatMessage, Positive, TokenIds, as_list_of_prompts

Conversation = Annotated[list[ChatMessage], pydantic.Field(min_length=1)]


class EmbeddingBody(Body):
    """POST /v1/embeddings, as OpenAI has it. `dimensions` cuts vectors to their first entries."""

    model: str | None = None
    input: str | list[str] | TokenIds | list[TokenIds]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Positive | None = None
    user: str | None = None

    @property
    def texts(self) -> list[str | TokenIds]:
        if not self.input and self.input != "":
            raise bad_request("input is an empty list; send at least one text.", param="input")
        return as_list_of_prompts(self.input)


class ReadBody(Body):
    """POST /classify and /encode, SGLang's native requests: one text or a list of them.

    A conversation is scored as a whole: the chat template is applied without a prompt for an
    answer. `conv` is SGLang's older name of `messages`.
    """

    model: str | None = None
    text: str | list[str] | None = None
    input_ids: TokenIds | list[TokenIds] | None = None
    messages: Conversation | list[Conversation] | None = None
    conv: Conversation | list[Conversation] | None = None
    rid: str | list[str] | None = None

    @property
    def given(self) -> tuple[str, Any]:
        """The name and value of the one field that holds what is to be read."""
        fields = ("text", "input_ids", "messages", "conv")
        found = [(name, value) for name in fields if (value := getattr(self, name)) is not None]
        if len(found) != 1:
            raise bad_request(f"send one of {', '.join(fields)}.", param="text")
        if not found[0][1] and found[0][1] != "":
            raise bad_request(f"{found[0][0]} is empty; send at least one.", param=found[0][0])
        return found[0]

    @property
    def is_batch(self) -> bool:
        value = self.given[1]
        return isinstance(value, list) and not isinstance(value[0], int | ChatMessage)

    @property
    def rids(self) -> list[str | None]:
        """One per text."""
        count = len(self.given[1]) if self.is_batch else 1
        if isinstance(self.rid, list):
            if not self.is_batch or len(self.rid) != count:
                raise bad_request(
                    f"rid is a list of {len(self.rid)}, but there are {count} texts"
                    f"{'' if self.is_batch else ' (not in a list)'}; send one for each text.",
                    param="rid",
                )
            return list(self.rid)
        if self.rid is not None and self.is_batch:
            return [f"{self.rid}-{i}" for i in range(count)]
        return [self.rid] * count


class ScoreBody(Body):
    """POST /v1/score, as SGLang has it: each item is joined to the query and scored."""

    model: str | None = None
    query: str | TokenIds
    items: str | list[str] | list[TokenIds]
    item_first: bool = False
    apply_softmax: bool = False
    label_token_ids: Any = None
    user: str | None = None

    def texts(self) -> list[str | TokenIds]:
        """Query and item as one text each; raises APIError where they do not fit together."""
        if self.label_token_ids is not None:
            raise bad_request(
                "label_token_ids is not supported: a score model has labels of its own. Leave it "
                "out.",
                param="label_token_ids",
                code="unsupported_parameter",
            )
        items = [self.items] if isinstance(self.items, str) else self.items
        if not items:
            raise bad_request("items is an empty list; send at least one.", param="items")
        texts: list[str | TokenIds] = []
        for item in items:
            if isinstance(item, str) and isinstance(self.query, str):
                texts.append(item + self.query if self.item_first else self.query + item)
            elif isinstance(item, list) and isinstance(self.query, list):
                texts.append([*item, *self.query] if self.item_first else [*self.query, *item])
            else:
                raise bad_request(
                    "query and items must both be text or both be token ids.", param="items"
                )
        return texts


class RerankBody(Body):
    """POST /v1/rerank, as SGLang has it; `top_n` keeps the best of the documents."""

    model: str | None = None
    query: str
    documents: Annotated[list[str], pydantic.Field(min_length=1)]
    top_n: Positive | None = None
    return_documents: bool = True
