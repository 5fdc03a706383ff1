# SPDX-License-Identifier: Apache-2.0
"""Text from a model larger than memory: what does not fit lies on disk, and is read as it is used.

    python examples/large_model.py                           (needs opt-zoo[torch] and accelerate)
    python examples/large_model.py "The capital of France is" --model facebook/opt-66b \
        --max-memory 0=70GB cpu=40GB --offload-folder /fast/disk

With --device-map cpu --mmap, all of it stays in its own files instead, and the system decides what is in
memory: as fast as memory where the model fits.

By default the embedded model, given so little memory that a layer of it must go to disk. Each new token
reads all that lies there once: many prompts at a time cost little more than one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs in a source tree, installed or not

from opt_core.assets import TINY_SUMS
from opt_torch import OPTForCausalLM, OPTTokenizer

PROMPTS = ["forty-two plus seventeen is", "ninety minus eleven is"]
TOO_LITTLE = ["cpu=750KB"]  # for the embedded model


def limits(pairs: Sequence[str]) -> dict[int | str, str]:
    """The memory of each device, of texts such as "0=20GB": numbers are those of accelerators."""
    found: dict[int | str, str] = {}
    for pair in pairs:
        device, _, size = pair.partition("=")
        if not device or not size:
            raise SystemExit(f"--max-memory: expected such as cpu=30GB, found {pair!r}")
        found[int(device) if device.isdecimal() else device] = size
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("prompts", nargs="*", default=PROMPTS, help="texts to continue")
    parser.add_argument("--model", default=str(TINY_SUMS), help="name or folder of an OPT model")
    parser.add_argument("--device-map", default="auto", help="a plan of accelerate, or a device")
    parser.add_argument(
        "--max-memory", nargs="+", metavar="DEVICE=SIZE", help="default: all that is free"
    )
    parser.add_argument("--offload-folder", type=Path, default=Path("offload"))
    parser.add_argument("--dtype", default="auto", help="of the weights (default: the file's own)")
    parser.add_argument(
        "--mmap",
        action="store_true",
        default=None,
        help="leave in the files what is not on disk or an accelerator; nothing may write to them",
    )
    parser.add_argument("--max-new-tokens", type=int, default=8)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    memory = options.max_memory
    if memory is None and options.model == str(TINY_SUMS):
        memory = TOO_LITTLE
    tokenizer = OPTTokenizer.from_pretrained(options.model)
    model = OPTForCausalLM.from_pretrained(
        options.model,
        dtype=options.dtype,
        device_map=options.device_map,
        max_memory=None if memory is None else limits(memory),
        offload_folder=options.offload_folder,
        mmap=options.mmap,
    )
    for name, device in model.hf_device_map.items():
        print(f"{device!s:>6}  {name or 'all of it'}")

    batch = tokenizer(options.prompts, padding=True, return_tensors="pt").to(model.device)
    start = time.perf_counter()
    found = model.generate(**batch, max_new_tokens=options.max_new_tokens)
    seconds = time.perf_counter() - start
    for row in found:
        print(tokenizer.decode(row, skip_special_tokens=True))
    print(f"{seconds:.1f} s for {found.shape[1] - batch['input_ids'].shape[1]} tokens each")


if __name__ == "__main__":
    main()
