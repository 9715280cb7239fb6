"""Strict reading of a Hugging Face `config.json`.

Every key a family does not read is an error, so that a checkpoint whose mathematics differ from
what is implemented is refused by name and never served wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_MISSING = object()

# Keys that never change the forward pass of a served model: bookkeeping of transformers, token ids
# (the tokenizer's business), dropouts (off at inference), initialisers, training switches.
IGNORED = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path add_cross_attention
    architectures attention_dropout attn_pdrop auto_map aux_loss_alpha begin_suppress_tokens
    bos_token_id cache_implementation chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id dtype embd_pdrop eos_token_id finetuning_task forced_bos_token_id
    forced_eos_token_id hidden_dropout id2label initializer_range is_decoder is_encoder_decoder
    label2id max_position_embeddings model_type output_attentions output_hidden_states
    output_router_logits pad_token_id prefix problem_type pruned_heads remove_invalid_values
    resid_pdrop return_dict router_aux_loss_coef sep_token_id seq_aux suppress_tokens
    task_specific_params tf_legacy_loss tie_encoder_decoder tokenizer_class torch_dtype torchscript
    transformers.js_config transformers_version unsloth_fixed unsloth_version use_bfloat16 use_cache
    """.split()  # noqa: SIM905 - one name per line would fill a screen
)


class UnsupportedConfig(ValueError):
    """A `config.json` asks for something this implementation does not do."""


class HFConfig:
    """A `config.json` (or a sub-config) that remembers which keys were read.

    Args:
        raw: the parsed JSON object.
        architecture: the class name it is read for; used in errors.
        where: dotted path of this sub-config inside the file, empty at the top.
    """

    def __init__(self, raw: Mapping[str, Any], architecture: str, where: str = ""):
        self.raw = raw
        self.architecture = architecture
        self._where = where
        self._read: set[str] = set()
        self._children: dict[str, HFConfig] = {}

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        if key not in self.raw:
            raise UnsupportedConfig(
                f"{self.architecture}: config.json has no key '{self._where}{key}', which this "
                f"architecture needs. Add it to the checkpoint's config.json."
            )
        return self.raw[key]

    def get(self, key: str, default: Any = None) -> Any:
        """Read `key`; a missing or null value gives `default`."""
        self._read.add(key)
        value = self.raw.get(key)
        return default if value is None else value

    def nullable(self, key: str, default: Any) -> Any:
        """Read `key`; a missing one gives `default`, null switches the feature off (None)."""
        self._read.add(key)
        return self.raw.get(key, default)

    def expect(self, key: str, *allowed: Any) -> None:
        """Read `key` where only some values are implemented; absent or null counts as allowed."""
        self._read.add(key)
        value = self.raw.get(key)
        if value is not None and value not in allowed:
            raise UnsupportedConfig(
                f"{self.architecture}: config key '{self._where}{key}' is {value!r}; implemented: "
                f"{', '.join(map(repr, allowed))}."
            )

    def sub(self, key: str, default: HFConfig | None = None) -> HFConfig:
        """The sub-config under `key`, checked for unread keys together with this one."""
        if default is not None and self.raw.get(key) is None:
            return default
        if key not in self._children:
            self._children[key] = HFConfig(self[key], self.architecture, f"{self._where}{key}.")
        return self._children[key]

    def layer_types(
        self,
        default: Callable[[int], str],
        allowed: tuple[str, ...] = ("full_attention", "sliding_attention"),
    ) -> tuple[str, ...]:
        """Kinds of the layers: the `layer_types` list, or `default(index)` where it is absent."""
        count = self["num_hidden_layers"]
        kinds = self.get("layer_types") or [default(i) for i in range(count)]
        if len(kinds) != count:
            raise UnsupportedConfig(
                f"{self.architecture}: 'layer_types' names {len(kinds)} layers, "
                f"'num_hidden_layers' is {count}. Make them agree."
            )
        if unknown := sorted(set(kinds) - set(allowed)):
            raise UnsupportedConfig(
                f"{self.architecture}: 'layer_types' has {', '.join(map(repr, unknown))}; "
                f"implemented: {', '.join(map(repr, allowed))}."
            )
        return tuple(kinds)

    def unread(self) -> list[str]:
        """Dotted names of the keys nobody read and that may change the model."""
        own = [
            f"{self._where}{key}"
            for key, value in self.raw.items()
            if key not in self._read and key not in IGNORED and value is not None
        ]
        return sorted(own + [name for child in self._children.values() for name in child.unread()])

    def check_all_read(self, home: str) -> None:
        """Raise `UnsupportedConfig` naming every unread key; `home` is the file to extend."""
        if names := self.unread():
            raise UnsupportedConfig(
                f"{self.architecture}: these config keys may change the model and were not read: "
                f"{names}. Read them in {home} (or name them in the family's `ignored`)."
            )
