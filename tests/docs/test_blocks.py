# SPDX-License-Identifier: Apache-2.0
"""Every Python block of README and docs runs; each page and framework in a process of its own.

A block that begins with `# not run` is left out. Who copies one is warned of nothing.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BACKENDS = ("opt_torch", "opt_tf", "opt_flax")
NEUTRAL = "no framework"


def programs() -> dict[tuple[str, str], list[str]]:
    """Blocks by page and by the backend that they import."""
    found: dict[tuple[str, str], list[str]] = {}
    for page in PAGES:
        for block in re.findall(
            r"^```python\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL
        ):
            if not block.startswith("# not run"):
                backend = next((name for name in BACKENDS if name in block), NEUTRAL)
                found.setdefault((page.name, backend), []).append(block)
    return found


@pytest.mark.parametrize("key", programs(), ids=" ".join)
def test_blocks_run(key: tuple[str, str], tmp_path: Path) -> None:
    script = tmp_path / "blocks.py"
    script.write_text("\n".join(programs()[key]), encoding="utf-8")
    code = f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r}); runpy.run_path({str(script)!r})"
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:<run_path>", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if key[0] == "README.md":
        assert "ninety-six plus eighty-seven is one hundred eighty-three" in done.stdout


def test_the_readme_has_a_block_for_each_framework() -> None:
    assert {backend for page, backend in programs() if page == "README.md"} == set(BACKENDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"
