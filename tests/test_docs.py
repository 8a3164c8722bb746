"""The reference that ``pdoc tats_env agents`` builds: whole, and without a warning."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

pdoc = pytest.importorskip("pdoc.doc")

SECTIONS = [  # of Gymnasium's own pages, in their order
    "Description", "Action Space", "Observation Space", "Rewards", "Starting State", "Episode End", "Information",
    "Arguments", "Vectorized environment", "Version History",
]  # fmt: skip


def modules() -> Iterator[str]:
    for package in ("tats_env", "agents", "experiments"):
        yield package
        path = import_module(package).__path__
        yield from (found.name for found in pkgutil.walk_packages(path, f"{package}."))


def undocumented(doc: object) -> Iterator[str]:
    """Public names of a module or class, defined there, of functions, classes and methods without a docstring."""
    for member in doc.own_members:  # type: ignore[attr-defined]
        if member.name.startswith("_") or member.kind not in ("function", "class"):
            continue
        if not member.docstring.strip():
            yield member.fullname
        if member.kind == "class":
            yield from undocumented(member)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in modules() if not name.endswith("__main__")])
def test_every_public_name_has_a_docstring(name: str) -> None:
    module = pdoc.Module(import_module(name))
    assert module.docstring.strip()
    assert not list(undocumented(module))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command of the README writes."""
    out = tmp_path_factory.mktemp("reference")
    command = [sys.executable, "-m", "pdoc", "tats_env", "agents", "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert not done.stdout + done.stderr
    return out


def test_the_reference_is_built_without_a_warning(pages: Path) -> None:
    for page in ("tats_env.html", "tats_env/env.html", "tats_env/mae.html", "agents/ppo.html", "agents/base.html"):
        assert (pages / page).is_file()


def test_the_environment_s_page_reads_as_gymnasium_s_do(pages: Path) -> None:
    html = (pages / "tats_env" / "env.html").read_text(encoding="utf-8")
    headings = [re.sub(r"<.*?>", "", heading).strip() for heading in re.findall(r"<h[1-6][^>]*>(.*?)</h[1-6]>", html)]
    assert [heading for heading in headings if heading in SECTIONS] == SECTIONS
    assert html.count("<table>") == 3 and "negative_reconstruction_error" in html
