"""What a user can set: two frozen configs, the command-line flags made from them, JAX's settings.

This is the only module that reads the environment, and the only home of a flag's spelling. It
imports nothing heavy, so that `--help` and flag errors are instant.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

DTYPES = ("auto", "float32", "bfloat16", "float16")
DTYPE_ALIASES = {"float": "float32", "half": "float16"}
LOAD_FORMATS = ("auto", "dummy")
DEVICES = ("auto", "cpu", "tpu", "gpu")
DEVICE_ALIASES = {"cuda": "gpu"}
# What JAX calls the platforms; "cpu" stays available for host-side work.
JAX_PLATFORMS = {"cpu": "cpu", "tpu": "tpu,cpu", "gpu": "cuda,cpu"}
# What the variables begin with that can change what XLA compiles.
COMPILE_VARIABLES = (
    *("XLA_", "JAX_", "LIBTPU_", "TPU_", "TF_", "CUDA_", "NVIDIA_", "HIP_", "ROCM_", "MOSAIC_"),
    *("TRITON_", "PALLAS_", "NCCL_", "LLVM_", "OMP_", "KMP_", "LD_LIBRARY_PATH", "LD_PRELOAD"),
)
# For a libtpu that only compiles.
LIBTPU_COMPILES = types.MappingProxyType(
    {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        # What it would ask the cloud host for; the topology to compile for is named apart.
        "TPU_ACCELERATOR_TYPE": "v6e-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
)
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")

ConfigT = TypeVar("ConfigT", "EngineConfig", "ServerConfig")


class ConfigError(ValueError):
    """A setting that cannot work; the message names the flag, its value and what is allowed."""


def setting(default: Any, help: str, *spellings: str, choices: tuple[str, ...] = ()) -> Any:
    """Declare a config field that is also a flag.

    Args:
        default: the field's default; `dataclasses.MISSING` for a required field.
        help: one line for `--help`.
        spellings: extra flag names; the first one is `--` plus the field's name in kebab case.
        choices: the values `--help` lists; aliases outside this list may exist.
    """
    metadata = {"help": help, "spellings": spellings, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


def flag_name(field_name: str) -> str:
    """Return the flag that sets a config field: `tp_size` -> `--tp-size`."""
    return "--" + field_name.replace("_", "-")


@dataclass(frozen=True)
class EngineConfig:
    """Everything the engine needs to know before it loads a model.

    None means "chosen by the engine from the model and the device". Raises ConfigError listing
    every setting that cannot work.
    """

    model_path: str = setting(
        dataclasses.MISSING,
        "hub id, Hugging Face folder, .gguf file, Orbax folder, or the word 'demo'",
        "--model",
    )
    load_format: str = setting(
        "auto",
        "auto: the checkpoint's weights; dummy: random ones, made from a config.json alone (its "
        "path, a folder that holds it, or a hub id)",
        choices=LOAD_FORMATS,
    )
    tokenizer_path: str | None = setting(None, "folder or hub id of the tokenizer, if elsewhere")
    revision: str | None = setting(None, "branch, tag or commit of a hub model")
    download_dir: str | None = setting(None, "where downloaded models are kept")
    dtype: str = setting(
        "auto", "dtype of weights and activations; auto: the checkpoint's", choices=DTYPES
    )
    device: str = setting("auto", "platform to run on; auto: the best one found", choices=DEVICES)
    tp_size: int = setting(
        1, "devices one copy of the model is split over", "--tensor-parallel-size", "--tp"
    )
    dp_size: int = setting(
        1, "copies of the model that share the requests", "--data-parallel-size", "--dp"
    )
    ep_size: int = setting(
        1,
        "groups of the --tp-size devices that keep different experts; each expert is split inside "
        "its group",
        "--expert-parallel-size",
        "--ep",
    )
    page_size: int | None = setting(None, "tokens per page of KV memory")
    mem_fraction_static: float | None = setting(
        None, "share of device memory for weights and KV pages, in (0, 1]"
    )
    max_total_tokens: int | None = setting(
        None, "upper bound of KV tokens per copy of the model (default: what memory allows)"
    )
    is_embedding: bool = setting(
        False, "give vectors for texts, with a model that would otherwise write text"
    )
    context_length: int | None = setting(
        None, "longest prompt plus output in tokens (default: the model's)"
    )
    max_running_requests: int | None = setting(None, "requests in one step, per copy of the model")
    chunked_prefill_size: int | None = setting(None, "tokens in one step, per copy of the model")
    disable_overlap_schedule: bool = setting(
        False, "schedule a step only after the previous one has ended"
    )
    random_seed: int = setting(0, "seed for requests that bring none")
    compile_cache_dir: str | None = setting(
        None, "where compiled steps are kept; 'none' turns it off (default: the user's cache)"
    )
    compile_cache_bytes: int = setting(8 * 2**30, "size at which old compiled steps are dropped")
    skip_background_compile: bool = setting(
        False, "serve with the largest batch shape alone: every step pays for a full one"
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", DTYPE_ALIASES.get(self.dtype, self.dtype))
        object.__setattr__(self, "device", DEVICE_ALIASES.get(self.device, self.device))
        problems = [
            *_types_problems(self),
            *_choice_problems(self, "dtype", tuple(DTYPE_ALIASES)),
            *_choice_problems(self, "load_format", ()),
            *_choice_problems(self, "device", tuple(DEVICE_ALIASES)),
            *_minimum_problems(
                self,
                1,
                "tp_size",
                "dp_size",
                "ep_size",
                "page_size",
                "max_total_tokens",
                "context_length",
                "max_running_requests",
                "chunked_prefill_size",
                "compile_cache_bytes",
            ),
        ]
        if self.model_path == "":
            problems.append("--model-path is empty; name a hub id, a folder, a file or 'demo'")
        sizes = self.tp_size, self.ep_size
        if all(map(_is_number, sizes)) and self.ep_size >= 1 and self.tp_size % self.ep_size:
            problems.append(
                f"--ep-size is {self.ep_size}; allowed: a divisor of --tp-size, which is "
                f"{self.tp_size}"
            )
        fraction = self.mem_fraction_static
        if _is_number(fraction) and not 0.0 < fraction <= 1.0:
            problems.append(f"--mem-fraction-static is {fraction}; allowed: above 0 and up to 1")
        if _is_number(self.random_seed) and not 0 <= self.random_seed < 2**32:
            problems.append(f"--random-seed is {self.random_seed}; allowed: 0 to 4294967295")
        _raise_problems(problems)


@dataclass(frozen=True)
class ServerConfig:
    """Everything the HTTP server needs to know. Raises ConfigError like EngineConfig."""

    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(30000, "port to listen on")
    api_key: str | None = setting(None, "key that clients must send as a bearer token")
    served_model_name: str | None = setting(
        None, "name of the model in the API (default: the model path)"
    )
    chat_template: str | None = setting(
        None, "Jinja file, or text, that replaces the checkpoint's chat template"
    )
    log_level: str = setting("info", "how much to log", choices=LOG_LEVELS)
    trust_remote_code: bool = setting(
        False, "accepted for compatibility; code in a checkpoint is never executed"
    )
    drain_timeout_s: float = setting(
        30.0, "seconds that running requests get to finish after SIGTERM"
    )

    def __post_init__(self) -> None:
        problems = [*_types_problems(self), *_choice_problems(self, "log_level", ())]
        if _is_number(self.port) and not 1 <= self.port <= 65535:
            problems.append(f"--port is {self.port}; allowed: 1 to 65535")
        if _is_number(self.drain_timeout_s) and not self.drain_timeout_s >= 0:
            problems.append(f"--drain-timeout-s is {self.drain_timeout_s}; allowed: 0 or more")
        _raise_problems(problems)


# ---- flags ------------------------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser, config_class: type[ConfigT]) -> None:
    """Add one flag per field of `config_class`; none of them is required on the command line."""
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        names = (flag_name(field.name), *field.metadata["spellings"])
        help = field.metadata["help"].replace("%", "%%")
        if hints[field.name] is bool:
            parser.add_argument(*names, dest=field.name, action="store_true", help=help)
            continue
        if field.default is not dataclasses.MISSING and field.default is not None:
            help += " (default: %(default)s)"
        choices = field.metadata["choices"]
        metavar = "{" + ",".join(choices) + "}" if choices else None
        parser.add_argument(
            *names,
            dest=field.name,
            type=_value_type(hints[field.name]),
            default=None if field.default is dataclasses.MISSING else field.default,
            metavar=metavar,
            help=help,
        )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the model as a positional, for commands that have --model-path too."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="the model; the same as --model-path MODEL"
    )


def take_model(namespace: argparse.Namespace, command: str) -> None:
    """Make the positional MODEL the model path; raises ConfigError unless one model was given."""
    if namespace.model is not None:
        if namespace.model_path not in (None, namespace.model):
            raise ConfigError(
                f"two models were given: {namespace.model!r} and --model-path "
                f"{namespace.model_path!r}; give one"
            )
        namespace.model_path = namespace.model
    if namespace.model_path is None:
        raise ConfigError(
            f"no model was given; name one: jaxserve {command} MODEL, or --model-path"
        )


def from_args(config_class: type[ConfigT], namespace: argparse.Namespace) -> ConfigT:
    """Build a config from parsed flags; raises ConfigError where a required one is absent."""
    values = {
        field.name: getattr(namespace, field.name)
        for field in dataclasses.fields(config_class)
        if getattr(namespace, field.name, None) is not None
    }
    absent = [
        flag_name(field.name)
        for field in dataclasses.fields(config_class)
        if field.default is dataclasses.MISSING and field.name not in values
    ]
    if absent:
        raise ConfigError(f"{', '.join(absent)} must be given")
    return config_class(**values)


# ---- the environment and JAX ------------------------------------------------------------------


def user_cache_dir() -> Path:
    """Return this user's cache folder for jaxserve; XDG_CACHE_HOME moves it. Does not create it."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "jaxserve"


def compile_cache_path(config: EngineConfig) -> Path | None:
    """Return where compiled steps are kept, or None when the cache is turned off."""
    if config.compile_cache_dir == "none":
        return None
    if config.compile_cache_dir is not None:
        return Path(config.compile_cache_dir).expanduser()
    return user_cache_dir() / "compile"


def compile_cache_folder(config: EngineConfig) -> Path | None:
    """Return the compile cache in force if it is ours; None if it is off or set through JAX."""
    # Deferred: see configure_jax, which has run before.
    import jax

    path = compile_cache_path(config)
    return path if path is not None and jax.config.jax_compilation_cache_dir == str(path) else None


def compile_environment() -> list[tuple[str, str]]:
    """Return the environment variables that XLA, its backends and JAX may read, sorted."""
    return sorted(item for item in os.environ.items() if item[0].startswith(COMPILE_VARIABLES))


def configure_topologies() -> None:
    """Let JAX run on the CPU, and libtpu compile for TPUs that are not there.

    libtpu then asks no cloud host what it runs on, and other processes may do the same meanwhile.
    Call it before JAX starts.
    """
    for name, value in LIBTPU_COMPILES.items():
        os.environ.setdefault(name, value)
    import jax

    jax.config.update("jax_platforms", "cpu")


def configure_jax(config: EngineConfig) -> None:
    """Apply platform, virtual device count and compile cache to JAX; safe to call again.

    Call it before the first JAX array exists: JAX fixes its platforms and its number of CPU
    devices on first use. A compile cache that the user set through JAX itself
    (JAX_COMPILATION_CACHE_DIR) stays unless --compile-cache-dir names another one.

    Raises:
        ConfigError: JAX has already started with fewer CPU devices, or without the platform.
    """
    # Deferred: half a second that `--help` and flag errors should not cost.
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    num_devices = config.tp_size * config.dp_size
    if config.device == "cpu" and num_devices > 1:
        _want_cpu_devices(jax, num_devices)
    if config.device != "auto":
        _choose_platform(jax, config.device)

    before = jax.config.jax_compilation_cache_dir
    if config.compile_cache_dir is None and before is not None:
        return
    path = compile_cache_path(config)
    if path is not None:
        # Executables are loaded from here and run: nobody else may write to it.
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_max_size", config.compile_cache_bytes)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    after = None if path is None else str(path)
    if after != before:
        jax.config.update("jax_compilation_cache_dir", after)
        # JAX remembers the folder, or its absence, from its first compilation.
        compilation_cache.reset_cache()


def _choose_platform(jax: types.ModuleType, device: str) -> None:
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", JAX_PLATFORMS[device])
    try:
        jax.devices(device)
    except RuntimeError as error:
        jax.config.update("jax_platforms", before)
        raise ConfigError(
            f"--device {device}: JAX cannot use it on this machine: {error}"
        ) from error


def _want_cpu_devices(jax: types.ModuleType, num_devices: int) -> None:
    if jax.config.jax_num_cpu_devices >= num_devices:
        return
    try:
        jax.config.update("jax_num_cpu_devices", num_devices)
    except RuntimeError as error:  # JAX has started: the number it started with is final
        found = len(jax.devices("cpu"))
        if found < num_devices:
            raise ConfigError(
                f"--tp-size times --dp-size is {num_devices}, but JAX has already started with "
                f"{found} CPU devices; build the engine before any other use of JAX, or set "
                f"JAX_NUM_CPU_DEVICES={num_devices}"
            ) from error


# ---- validation -------------------------------------------------------------------------------


def _value_type(hint: Any) -> type:
    """Return the one type a flag's text is turned into: `int | None` -> `int`."""
    if isinstance(hint, types.UnionType):
        (hint,) = (member for member in typing.get_args(hint) if member is not types.NoneType)
    return hint


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _types_problems(config: EngineConfig | ServerConfig) -> list[str]:
    """List the fields whose value is of another type than declared (Python callers)."""
    problems = []
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        wanted = _value_type(hints[field.name])
        if value is None and hints[field.name] is not wanted:
            continue
        fits = (
            _is_number(value)
            if wanted is float
            else isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))
        )
        if not fits:
            problems.append(
                f"{flag_name(field.name)} is {value!r}; allowed: a value of type {wanted.__name__}"
            )
    return problems


def _choice_problems(
    config: EngineConfig | ServerConfig, name: str, aliases: tuple[str, ...]
) -> list[str]:
    (field,) = (field for field in dataclasses.fields(config) if field.name == name)
    value = getattr(config, name)
    choices = field.metadata["choices"]
    if not isinstance(value, str) or value in choices:
        return []
    return [f"{flag_name(name)} is {value!r}; allowed: {', '.join((*choices, *aliases))}"]


def _minimum_problems(config: EngineConfig, minimum: int, *names: str) -> list[str]:
    values = ((name, getattr(config, name)) for name in names)
    return [
        f"{flag_name(name)} is {value}; allowed: {minimum} or more"
        for name, value in values
        if _is_number(value) and value < minimum
    ]


def _raise_problems(problems: list[str]) -> None:
    if problems:
        raise ConfigError("; ".join(problems))
