"""The quickstart notebook runs, shows its picture, and matches its paired script."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_notebook_equals_its_script() -> None:
    notebook = nbformat.read(NOTEBOOKS / "quickstart.ipynb", as_version=4)
    script = jupytext.read(NOTEBOOKS / "quickstart.py")
    assert cells(notebook) == cells(script), "run: jupytext --sync notebooks/quickstart.py"


def test_quickstart_runs_on_a_tiny_model(
    tmp_path: Path, make_byte_tokenizer: Callable[..., Path], compile_cache: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=262,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
    )
    model = tmp_path / "model"
    transformers.LlamaForCausalLM(config).save_pretrained(model)
    make_byte_tokenizer(model)
    shutil.copy(NOTEBOOKS / "quickstart.ipynb", tmp_path)
    notebook = nbformat.read(tmp_path / "quickstart.ipynb", as_version=4)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", ()):
            cell.source = f"MODEL = {str(model)!r}"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no picture was drawn"
    text = "".join(output.get("text", "") for output in outputs)
    assert "bucket: 32x4" in text
