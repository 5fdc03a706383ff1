# SPDX-License-Identifier: Apache-2.0
"""What `benchmarks/gpu.py` found of decoding, prefill and training, as tables."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.gpu_case import PEER, Case, Results
from benchmarks.gpu_report import reasons
from benchmarks.gpu_table import (
    DECODERS,
    FLAX_TARGET,
    FRAMEWORKS,
    PEER_TARGETS,
    SHARE_TARGETS,
    WIDTHS,
    config_of,
    forward_operations,
    new_tokens,
    step_bytes,
    training_operations,
)
from benchmarks.tables import markdown, verdict

#: The peers that everyone of a section stands beside.
PEERS = {
    "decode": (PEER, f"{PEER} static"),
    "prefill": (PEER, f"{PEER} flash"),
    "training": (PEER, f"{PEER} flash"),
}
#: What the share in a table is a share of.
SHARES = {"decode": "of bandwidth", "prefill": "of products", "training": "of products"}


def width(name: str) -> float:
    """Bytes of a number in a contestant's matrices."""
    return next((WIDTHS[word] for word in name.split() if word in WIDTHS), WIDTHS["bfloat16"])


def rate(case: Case, name: str) -> float:
    """Tokens per second: the new ones of decoding, else those given."""
    tokens = new_tokens(case.section, case.size) if case.section == "decode" else case.length
    return case.batch * tokens / case.entries[name].median


def share(case: Case, name: str, card: dict[str, float]) -> float | None:
    """What share of what plain operations reach is put to use; None where that was not measured."""
    if not card:
        return None
    config, seconds = config_of(case.size), case.entries[name].median
    if case.section == "decode":
        work = new_tokens(case.section, case.size) * step_bytes(config, width(name))
        return work / seconds / max(card["copy"], card["read"])
    if case.section == "prefill":
        work = forward_operations(config, case.batch, case.length, head=False)
    else:
        work = training_operations(config, case.batch, case.length)
    return work / seconds / card["product"]


def fastest(case: Case) -> str | None:
    """Of ours, with plain weights."""
    names = [name for name in case.entries if case.timed(name)]
    plain = [name for name in names if name.split()[0] != PEER and width(name) == 2]
    return min(plain, key=lambda name: case.entries[name].median) if plain else None


def table(results: Results, cases: Sequence[Case]) -> str:
    """Some cases of one section: speed, ratios to the peers, and of JAX to PyTorch in `results`."""
    section = cases[0].section
    peers = PEERS[section]
    head = ["size", "tokens", "framework", "contestant", "time", "tokens/s", SHARES[section]]
    rows = [[*head, *(f"to {peer}" for peer in peers), "to PyTorch", "start", "error"]]
    for case in sorted(cases, key=_order):
        twins = [each for each in results.cases if each.key == (*case.key[:-1], "torch")]
        for name, entry in case.entries.items():
            if case.timed(name):
                rows.append(
                    [
                        case.size,
                        f"{case.batch} x {case.length}",
                        FRAMEWORKS[case.framework],
                        name,
                        f"{entry.median * 1e3:.1f} ms",
                        f"{rate(case, name):.0f}",
                        _share(case, name, results),
                        *(_to_peer(case, name, peer) for peer in peers),
                        _to_torch(case, name, twins),
                        f"{entry.start:.1f} s",
                        f"{entry.error:.0e}",
                    ]
                )
    return markdown(rows)


def report(results: Results, cases: Sequence[Case]) -> str:
    """Some cases of one section, and who was not timed."""
    return table(results, cases) + reasons(cases)


def card(results: Results) -> str:
    """What plain operations reach, as a list of Markdown."""
    found = results.card
    if not found:
        return ""
    return (
        f"- Copying {found['bytes'] / 2**30:.0f} GiB: {found['copy'] / 1e9:.0f} GB/s, read and written; "
        f"summing them up: {found['read'] / 1e9:.0f} GB/s. The larger is the bandwidth.\n"
        f"- A bfloat16 product of {found['side']} x {found['side']} matrices: "
        f"{found['product'] / 1e12:.0f} TFLOP/s.\n"
    )


def _order(case: Case) -> tuple[int, int, bool]:
    place = DECODERS.index(case.size) if case.size in DECODERS else -1
    return place, case.length, case.framework != "torch"


def _share(case: Case, name: str, results: Results) -> str:
    found = share(case, name, results.card)
    aimed = SHARE_TARGETS.get((case.section, case.size)) if name == fastest(case) else None
    if case.framework != "torch":
        aimed = None
    return "-" if found is None else verdict(found, aimed)


def _to_peer(case: Case, name: str, peer: str) -> str:
    found = None if name.split()[0] == PEER else case.ratio(name, peer)
    aimed = None
    if peer == PEER and name == fastest(case):
        aimed = PEER_TARGETS.get((case.section, case.size))
    return "-" if found is None else verdict(found, aimed)


def _to_torch(case: Case, name: str, twins: Sequence[Case]) -> str:
    """The speed of JAX by that of the fastest of ours in PyTorch, which ran before or after it."""
    best = fastest(twins[0]) if twins else None
    if case.framework == "torch" or best is None:
        return "-"
    found = twins[0].entries[best].median / case.entries[name].median
    return verdict(found, round(1 / FLAX_TARGET, 2) if name == fastest(case) else None)
