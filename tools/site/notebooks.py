"""Notebooks in docs/: run them anew with `python tools/site/notebooks.py`, and a hook of mkdocs that makes pages of them.

A page is the cells and the outputs that are stored in the file, as Markdown. So its links are checked, its text is found by the search, and
it looks like every other page. (mkdocs-jupyter does none of these, and its pages load scripts from the network.) The notebook lies beside
it.
"""

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent.parent / "docs"


def markdown(path: Path) -> str:
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        if text := printed(cell):
            parts.append(f'```text title="Output"\n{text.rstrip()}\n```')
    return "\n\n".join(parts) + "\n"


def printed(cell: dict[str, Any]) -> str:
    """What a cell prints, and the value that it ends with."""
    return "".join(line for output in cell.get("outputs", ()) for line in output.get("text") or output["data"]["text/plain"])


def run(path: Path, folder: Path) -> Any:
    """The notebook with the outputs of a run in `folder`, in a kernel of this Python. An error in a cell raises CellExecutionError."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    metadata = dict(notebook.metadata)
    options = {"timeout": None, "startup_timeout": 600, "record_timing": False, "coalesce_streams": True}  # the machine may be busy
    NotebookClient(notebook, resources={"metadata": {"path": str(folder)}}, **options).execute()
    notebook.metadata = metadata  # without the version of Python
    return notebook


def on_files(files: Any, config: Any) -> Any:
    """mkdocs: a page beside each notebook."""
    from mkdocs.structure.files import File

    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        text = f"{markdown(Path(file.abs_src_path))}\nThis page is a notebook: [{file.name}.ipynb]({file.name}.ipynb){{ download }}\n"
        files.append(File.generated(config, file.src_uri.replace(".ipynb", ".md"), content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """mkdocs: links to a notebook, which GitHub shows, lead to its page."""
    return re.sub(r"(\]\([\w/-]+)\.ipynb\)(?!\{)", r"\1.md)", markdown)


if __name__ == "__main__":
    import tempfile

    import nbformat

    for path in sorted(DOCS.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(run(path, Path(folder)), path)
