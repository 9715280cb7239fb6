"""Facts about the source tree that no reviewer should have to check by eye."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("jaxserve", "converters", "model_defs", "pallas_kernels")
TOP_LEVEL = {
    *PACKAGES,
    "tests",
    "notebooks",
    "pyproject.toml",
    "Makefile",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    ".ci",
    ".gitignore",
    ".pre-commit-config.yaml",
}

# Each package may import itself and the packages to its right (rule 1).
MAY_IMPORT = {
    "jaxserve": {"jaxserve", "converters", "model_defs", "pallas_kernels"},
    "converters": {"converters", "model_defs"},
    "model_defs": {"model_defs", "pallas_kernels"},
    "pallas_kernels": {"pallas_kernels"},
}
# Inside jaxserve: a part may import itself, these parts, and modules of the package root.
PARTS_MAY_IMPORT = {
    "scheduler": set(),
    "sampling": set(),
    "engine": {"scheduler", "sampling"},
    "server": {"engine", "scheduler", "sampling"},
    "bench": {"engine", "scheduler", "sampling", "server"},
    "verification": {"engine", "scheduler", "sampling"},
}
# The files of jaxserve, besides engine/, whose work is to look into models or checkpoints (rule 3).
SEES_MODELS = {
    f"jaxserve/{name}.py" for name in ("cli", "demo", "hf_reference", "show", "verification/run")
}
# Needed by some users or commands only, so that a function may import them (rule 1).
OPTIONAL = {"torch", "orbax", "transformers"}
DEFERRED = {"jaxserve/config.py": {"jax"}}  # `--help` must not wait for JAX
TORCH_FILES = {"jaxserve/hf_reference.py"}
ENVIRONMENT_FILES = {"jaxserve/config.py"}
# A rope scaling whose published name, in config.json, is also a family's.
SCALING_NAMES = {"model_defs/layers/rope.py": "llama3"}

Imports = list[tuple[str, bool]]  # dotted module, whether a function body imports it


def files_of(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def product_files() -> list[Path]:
    return [path for package in PACKAGES for path in files_of(package)]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def type_checking_only(tree: ast.Module) -> set[ast.AST]:
    """Return the nodes under `if TYPE_CHECKING:`, which never run."""
    guards = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    return {inner for guard in guards for statement in guard.body for inner in ast.walk(statement)}


def imports_of(path: Path) -> Imports:
    """List what a file imports; `from a import b` counts as `a` and as `a.b`."""
    tree = parse(path)
    local = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    skipped = type_checking_only(tree)
    package = path.relative_to(ROOT).parent.parts
    found: Imports = []
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node in local) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            found.append((module, node in local))
            found += [(f"{module}.{alias.name}", node in local) for alias in node.names]
    return found


def imported_roots(path: Path) -> set[str]:
    return {module.split(".")[0] for module, _ in imports_of(path)}


def starts_with(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_to_the_right(package: str) -> None:
    wrong = {
        f"{name_of(path)} imports {root}"
        for path in files_of(package)
        for root in imported_roots(path) & set(PACKAGES) - MAY_IMPORT[package]
    }
    assert not wrong


@pytest.mark.parametrize("part", sorted(PARTS_MAY_IMPORT))
def test_parts_of_jaxserve_import_only_to_the_right(part: str) -> None:
    forbidden = set(PARTS_MAY_IMPORT) - PARTS_MAY_IMPORT[part] - {part}
    wrong = {
        f"{name_of(path)} imports {module}"
        for path in files_of(f"jaxserve/{part}")
        for module, _ in imports_of(path)
        for other in forbidden
        if starts_with(module, f"jaxserve.{other}")
    }
    assert not wrong


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in product_files()
    }
    graph = {
        name: {module for module, local in imports_of(path) if module in modules and not local}
        - {name}
        for name, path in modules.items()
        if path.name != "__init__.py"  # a package that re-exports its parts is no circle
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_only_optional_packages_are_imported_inside_functions() -> None:
    wrong = {
        f"{name_of(path)} imports {module} inside a function"
        for path in product_files()
        for module, local in imports_of(path)
        if local and module.split(".")[0] not in OPTIONAL | DEFERRED.get(name_of(path), set())
    }
    assert not wrong


def test_scheduler_and_request_import_neither_jax_nor_models() -> None:
    paths = [*files_of("jaxserve/scheduler"), *(ROOT / "jaxserve").glob("request.py")]
    forbidden = {"jax", "jaxlib", "flax", "model_defs", "pallas_kernels", "converters", "torch"}
    wrong = {
        f"{name_of(path)} imports {root}"
        for path in paths
        for root in imported_roots(path) & forbidden
    }
    assert paths
    assert not wrong


def test_scheduler_does_not_load_jax() -> None:
    code = (
        "import sys, jaxserve.scheduler.scheduler, jaxserve.request; "
        "sys.exit('jax' in sys.modules and 'jax was imported')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_only_layers_import_kernels() -> None:
    wrong = {
        f"{name_of(path)} imports {module}"
        for path in files_of("model_defs")
        if not name_of(path).startswith("model_defs/layers/")
        for module, _ in imports_of(path)
        if starts_with(module, "pallas_kernels")
    }
    assert not wrong


def test_only_the_engine_and_model_tools_import_models() -> None:
    wrong = {
        f"{name_of(path)} imports {module}"
        for path in files_of("jaxserve")
        if not name_of(path).startswith("jaxserve/engine/") and name_of(path) not in SEES_MODELS
        for module, _ in imports_of(path)
        if starts_with(module, "model_defs") or starts_with(module, "converters")
    }
    assert not wrong


def test_torch_stays_in_the_verification_tools() -> None:
    wrong = {
        name_of(path)
        for path in product_files()
        if "torch" in imported_roots(path) and name_of(path) not in TORCH_FILES
    }
    assert not wrong


def test_environment_is_read_in_one_place() -> None:
    wrong = set()
    for path in product_files():
        if name_of(path) in ENVIRONMENT_FILES:
            continue
        for node in ast.walk(parse(path)):
            attribute = isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"}
            imported = isinstance(node, ast.ImportFrom) and node.module == "os" and node.names
            if attribute or (imported and {a.name for a in imported} & {"environ", "getenv"}):
                wrong.add(f"{name_of(path)}:{node.lineno}")
    assert not wrong


def family_files() -> list[Path]:
    """Return the files of model_defs that register an architecture."""

    def registers(path: Path) -> bool:
        decorators = [
            decorator.func if isinstance(decorator, ast.Call) else decorator
            for node in ast.walk(parse(path))
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            for decorator in node.decorator_list
        ]
        return any(ast.unparse(decorator).split(".")[-1] == "register" for decorator in decorators)

    return [path for path in files_of("model_defs") if registers(path)]


def test_shared_code_names_no_family() -> None:
    families = family_files()
    assert families
    names = {words_of(path.stem)[0] for path in families}  # qwen2_vl -> qwen
    shared = [
        path
        for package in ("model_defs", "jaxserve", "pallas_kernels")
        for path in files_of(package)
        if path not in families and path.name != "arg_specs.py"  # shapes of real models: data
    ]
    wrong = {
        f"{name_of(path)}:{node.lineno}: {identifier}"
        for path in shared
        for node in ast.walk(parse(path))
        for identifier in identifiers_of(node)
        if names & set(words_of(identifier, SCALING_NAMES.get(name_of(path), "")))
    }
    assert not wrong


def words_of(identifier: str, published: str = "") -> list[str]:
    """Split `HF_LLAMA`, `Qwen2VLSpec` or `qwen2_vl` into lower-case words without digits.

    The word `published` is taken out first, digits included.
    """
    if published:
        identifier = re.sub(published, "", identifier, flags=re.IGNORECASE)
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", identifier)]


def identifiers_of(node: ast.AST) -> list[str]:
    """List the names that a node brings into the code; prose and string data are free."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        return [node.attr]
    if isinstance(node, ast.arg):
        return [node.arg]
    if isinstance(node, ast.keyword):
        return [node.arg or ""]
    if isinstance(node, ast.Compare):  # `if architecture == "..."` is the branch we never want
        return [
            part.value
            for part in ast.walk(node)
            if isinstance(part, ast.Constant) and isinstance(part.value, str)
        ]
    return []


def tracked_files() -> list[Path]:
    """Return the files of the project: those git tracks or would track."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    paths = (ROOT / name for name in listing.stdout.split("\0") if name)
    return [path for path in paths if path.is_file()]


def test_top_level_is_the_agreed_one() -> None:
    found = {path.relative_to(ROOT).parts[0] for path in tracked_files()}
    assert found - TOP_LEVEL == set()


def test_files_hold_no_paths_of_one_machine() -> None:
    # Spelled in pieces, so that this file passes its own test.
    roots = ("home/[a-z]", "root/", "Users/[A-Za-z]", "work/", "mnt/", "tmp/[a-z]", "workspace/")
    pattern = re.compile(r"(?<![\w.$~{}/:-])/(?:" + "|".join(roots) + ")")
    wrong = []
    for path in tracked_files():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        wrong += [
            f"{name_of(path)}:{number}: {line.strip()[:80]}"
            for number, line in enumerate(lines, start=1)
            if pattern.search(line)
        ]
    assert not wrong
