"""Documentation runs: README's Python blocks, every docstring's examples, the notebooks."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import zquant

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TINY_LLAMA = ROOT / "tests" / "data" / "tiny-llama-5m"
MODULES = sorted(
    {"zquant"}
    | {m.name for m in pkgutil.walk_packages(zquant.__path__, "zquant.")} - {"zquant.__main__", "zquant._core"}
)


def find_model():
    """all-MiniLM-L6-v2, which examples load; without it (or its tokenizer) the test is skipped."""
    pytest.importorskip("tokenizers")
    pytest.importorskip("safetensors")
    from zquant.demo_model import find_minilm

    try:
        return find_minilm()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def python_blocks(text):
    """[(line number, source)] of the blocks marked python."""
    return [
        (text[: m.start(1)].count("\n") + 1, m.group(1))
        for m in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S)
    ]


def run_blocks(path):
    """Run the blocks of a Markdown file in order, in one namespace; tracebacks point into the file."""
    namespace = {"__name__": "__main__"}
    blocks = python_blocks(path.read_text(encoding="utf-8"))
    for line, source in blocks:
        exec(compile("\n" * (line - 1) + source, str(path), "exec"), namespace)
    return len(blocks), namespace


def test_python_blocks_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n```python\nx = 1\n```\n```sh\nrm\n```\n\n```python\ny = x + 1\n```\n")
    count, namespace = run_blocks(page)
    assert count == 2 and namespace["y"] == 2
    page.write_text("a\n```python\nx = 1\n\nraise KeyError\n```\n")
    with pytest.raises(KeyError) as error:
        run_blocks(page)
    assert error.traceback[-1].lineno + 1 == 5


def test_readme(tmp_path, monkeypatch):
    """The README's Python runs where folders all-MiniLM-L6-v2 and tiny-llama-5m lie in the current directory."""
    (tmp_path / "all-MiniLM-L6-v2").symlink_to(find_model())
    (tmp_path / "tiny-llama-5m").symlink_to(TINY_LLAMA)
    monkeypatch.chdir(tmp_path)
    assert run_blocks(ROOT / "README.md")[0] > 0


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name, tmp_path, monkeypatch):
    if name == "zquant.plot":
        pytest.importorskip("matplotlib")
    module = importlib.import_module(name)
    examples = [test for test in doctest.DocTestFinder().find(module) if test.examples]
    sources = [example.source for test in examples for example in test.examples]
    if any("find_minilm" in source for source in sources):
        find_model()
    if any("tiny-llama-5m" in source for source in sources):
        pytest.importorskip("tokenizers")
        pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    failures, report = 0, []
    for test in examples:
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
        failures += runner.run(test, out=report.append, clear_globs=False).failed
    assert failures == 0, "".join(report)


@pytest.mark.parametrize("name", sorted(zquant.__all__))
def test_public_names_are_documented(name):
    """Functions and classes, each with an example of its own."""
    item = getattr(zquant, name)
    if inspect.isfunction(item) or inspect.isclass(item):
        assert ">>> " in (item.__doc__ or "")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, tmp_path, monkeypatch):
    """Every cell runs; the file itself is kept without outputs."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    for needed in ("ipykernel", "matplotlib"):
        pytest.importorskip(needed)
    if "find_minilm" in path.read_text(encoding="utf-8"):
        find_model()
    pytest.importorskip("tokenizers")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not any(
        cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells if cell.cell_type == "code"
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    client = nbclient.NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs), "a notebook shows a picture"


def test_there_are_notebooks():
    assert NOTEBOOKS
