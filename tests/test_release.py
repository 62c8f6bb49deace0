"""What a release says of itself agrees, and what pip installs from its files works outside of a checkout."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import cram_kernels

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "CITATION.cff").exists(), reason="not run from a source checkout")


def test_version_is_the_same_everywhere() -> None:
    newest = re.search(r"^## \[(\d\S*)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest is not None and newest[1] == cram_kernels.__version__
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (cited["version"], str(cited["date-released"])) == (cram_kernels.__version__, newest[2])


def test_the_package_is_described_as_on_its_index_and_promises_no_speed() -> None:
    """In no text of the tree, whatever its line breaks."""
    described = re.search(r'^description = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert described is not None and cram_kernels.__doc__ == f"{described[1]}."
    folders = ("cram_kernels", "csrc", "docs", "examples", "benchmarks", "tools")
    texts = [
        path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md", ".ipynb", ".h", ".cpp", ".cu")
    ]
    texts += [path for path in ROOT.iterdir() if path.suffix in (".md", ".toml", ".cff", ".yml", ".py")]
    assert len(texts) > 150
    claim = re.compile(r"as\s+fast\s+as\s+copying|copying\s+the\s+weights\s+once")
    assert [str(path) for path in texts if claim.search(path.read_text())] == []


def test_changelog_has_the_form_of_keep_a_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^(#+) (.+)$", text, re.M)
    assert headings[:2] == [("#", "Changelog"), ("##", "[Unreleased]")]
    versions = [heading for mark, heading in headings if mark == "##"]
    dates = [heading.rpartition(" ")[2] for heading in versions[1:]]
    assert dates == sorted(dates, reverse=True) and len({*dates}) == len(dates)
    links = {heading: re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-")) for heading in versions}  # as GitHub makes anchors
    assert re.findall(r"^(\[.+\]): #(.+)$", text, re.M) == [(heading.partition(" ")[0], link) for heading, link in links.items()]
    kinds = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
    for (mark, heading), (before, _) in zip(headings[1:], headings, strict=False):
        if mark == "##":
            assert heading == "[Unreleased]" or re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", heading), heading
        else:
            assert mark == "###" and heading in kinds and before != "#", heading


def test_citation_names_the_paper() -> None:
    """The keys that the schema of CFF 1.2.0 requires (https://citation-file-format.github.io); `make wheel` validates the whole file."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0" and cited["message"] and cited["authors"] and cited["title"] == "cram_kernels"
    paper = cited["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Peste", "Vladu", "Kurtic", "Lampert", "Alistarh"]
    assert paper["url"].endswith("2207.14200") and paper["year"] == 2023 and paper["type"] == "conference-paper"


def test_every_setting_is_on_the_page_that_says_what_it_can_do() -> None:
    page = (ROOT / "SECURITY.md").read_text()
    sources = [ROOT / "native_build.py", ROOT / "setup.py", *(ROOT / "cram_kernels").rglob("*.py"), *(ROOT / "csrc").rglob("*.*")]
    read = r'(?:environ(?:\.get\(|\[)|getenv\(|ENVIRONMENT = )"(\w+)"'
    found = {name for path in sources if path.suffix in (".py", ".h", ".cpp", ".cu") for name in re.findall(read, path.read_text())}
    assert {"CRAM_KERNELS_BACKEND", "CRAM_KERNELS_SIMD", "CRAM_KERNELS_LIBRARIES", "CXX"} <= found
    assert [name for name in found if f"`{name}`" not in page] == []


def test_targets_of_make_that_the_guide_names_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = re.findall(r"(?:^|`)make ([a-z][a-z -]*)", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    assert len(named) >= 5 and {target for line in named for target in line.split()} <= targets


TRAIN = """
import torch, cram_kernels
from cram_kernels import CrAM, TopK, prune
torch.manual_seed(0)
model = torch.nn.Linear(64, 32)
optimizer = CrAM(model, torch.optim.SGD, lr=0.1, compression=[TopK(sparsity=0.5)])
for half in (optimizer.perturb, optimizer.step):
    model(torch.ones(4, 64)).square().mean().backward()
    half()
prune(model, TopK(sparsity=0.5))
torch.save(model.state_dict(), "model.pt")
print(cram_kernels.__file__, int((model.weight == 0).sum()))
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_pip_installs_the_wheel_of_a_source_distribution(tmp_path: Path) -> None:
    """From the files of a source distribution alone a wheel is built; in a new environment, without the checkout, it trains, prunes and
    checks. Torch is the one of these tests."""
    checkout, dist = tmp_path / "checkout", tmp_path / "dist"
    left_out = shutil.ignore_patterns(".*", "build", "dist", "demo", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, checkout, ignore=left_out)
    environment = os.environ | {"CRAM_KERNELS_GPU_ARCHS": "none", "PYTHONPATH": ""}

    def run(*command: object, cwd: Path) -> str:
        done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-c", f"from setuptools.build_meta import build_sdist; build_sdist({str(dist)!r})", cwd=checkout)
    (source,) = dist.glob("*.tar.gz")
    pip = ("-m", "pip", "--disable-pip-version-check")
    run(sys.executable, *pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", dist, source, cwd=tmp_path)
    (wheel,) = dist.glob("*.whl")
    assert wheel.name.startswith(f"cram_kernels-{cram_kernels.__version__}-cp310-abi3-")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"cram_kernels/libcram_kernels_cpu.so", "cram_kernels/py.typed"} <= names
    assert not [name for name in names if name.split("/")[0] not in ("cram_kernels", f"cram_kernels-{cram_kernels.__version__}.dist-info")]

    venv.create(tmp_path / "new", with_pip=True)
    python = tmp_path / "new" / "bin" / "python"
    (packages,) = (tmp_path / "new").glob("lib/python*/site-packages")
    # Torch and what it needs, without the editable installation of the package itself, which hangs on a .pth file there.
    (packages / "torch_of_the_tests.pth").write_text(sysconfig.get_path("purelib"))
    run(python, *pip, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    file, zeros = run(python, "-c", TRAIN, cwd=tmp_path).split()
    assert Path(file).is_relative_to(packages) and int(zeros) == 64 * 32 // 2 + 1  # the k-th largest goes, too
    program = tmp_path / "new" / "bin" / "cram-kernels"
    assert f"cram_kernels {cram_kernels.__version__}" in run(program, "--version", cwd=tmp_path)
    assert re.search(r"^backend cpu +available$", run(program, "info", cwd=tmp_path), re.M)
    unstructured = subprocess.run([program, "check", "model.pt"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert unstructured.returncode == 1 and "violate 2:4" in unstructured.stdout
