# SPDX-License-Identifier: Apache-2.0
"""What the tables of `benchmarks/gpu.py` are printed with: tests, the machine, who was not timed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from benchmarks.gpu_case import Case, Results
from benchmarks.gpu_table import FRAMEWORKS


def machine(results: Results) -> str:
    """The card, and all versions, as a list of Markdown."""
    found = results.environment
    versions = found["versions"]
    card = [found["card"]]
    if "card_memory" in found:
        card += [f"{found['card_memory'] / 2**30:.0f} GiB", f"CUDA {found['cuda']}"]
    flash = "the flash_attn package" if "flash_attn" in versions else "PyTorch's own kernels"
    return (
        f"- {', '.join(card)}; {found['processor']}, {found['system']}, Python {found['python']}.\n"
        f"- {', '.join(f'{name} {version}' for name, version in versions.items())}.\n"
        f"- FlashAttention is {flash}.\n"
    )


def tests(results: Results) -> str:
    """What the tests of `tests/gpu` said, as a list of Markdown."""
    lines = [
        f"- Agreement, {FRAMEWORKS[name]}: {found['passed']} tests passed, {found['failed']} failed, "
        f"{found['skipped']} skipped in {found['seconds']:.0f} s"
        f"{', then the time was over' if found['cut'] else ''}.\n"
        for name, found in results.tests.items()
    ]
    return "".join(lines)


def reasons(cases: Iterable[Case]) -> str:
    """Who was not timed, and why, as a list of Markdown after a table; the same reason once."""
    cases, found = list(cases), {}
    for case in cases:
        where = f"{case.size} {case.batch} x {case.length}"
        differing = dict.fromkeys(case.differing, "computes other numbers")
        for name, why in (case.absent | differing).items():
            found.setdefault((FRAMEWORKS[case.framework], name, why), []).append(where)
    counts = Counter(FRAMEWORKS[case.framework] for case in cases)
    lines = [
        f"- {title}, {name}, {_places(where, counts[title])}: {why}\n"
        for (title, name, why), where in found.items()
    ]
    return "".join(["\n", *lines]) if lines else ""


def _places(where: Sequence[str], count: int) -> str:
    return "everywhere" if len(where) == count else ", ".join(dict.fromkeys(where))
