# SPDX-License-Identifier: Apache-2.0
"""The example that trains adapters: it learns, goes on where it stopped, and saves a plain model."""

from __future__ import annotations

import json

import jax
import numpy as np
import optax
import pytest

from examples import lora_flax
from examples.training import right_rows
from opt_core.assets import TINY_SUMS
from opt_flax import FlaxOPTForCausalLM, OPTTokenizer

pytestmark = pytest.mark.filterwarnings("ignore:'VariableState' was removed")  # qwix asks for it
SHORT = ["--steps", "7", "--save-every", "3", "--batch-size", "8", "--rank", "2"]


def test_it_learns_and_the_merged_model_answers(tmp_path):
    """Most of what is held out, of which the model that it starts from answers nothing."""
    plan = ["--steps", "80", "--batch-size", "64", "--learning-rate", "0.01"]
    lora_flax.main([*plan, "--output", str(tmp_path)])
    tokenizer = OPTTokenizer.from_pretrained(tmp_path)
    _, data = lora_flax.train_and_held_out(lora_flax.parse([]), tokenizer)
    model = FlaxOPTForCausalLM.from_pretrained(TINY_SUMS, param_dtype="float32")
    run = jax.jit(lambda params: model(data.input_ids, params=params).logits.argmax(-1))
    trained = FlaxOPTForCausalLM.from_pretrained(tmp_path)
    before, after = (
        right_rows(np.asarray(run(x.params)), data.labels) / len(data.labels)
        for x in (model, trained)
    )
    assert before < 0.05 and after > 0.3
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert after == pytest.approx(last["rows_right"], abs=0.05)  # which is that of a rounded base


def test_parts_weigh_as_many_labels_as_count():
    """The adapters' gradients and the loss are those of the whole batch."""
    ids = np.random.default_rng(0).integers(3, 90, (4, 7))
    labels = np.where(np.arange(7) > [[0], [0], [5], [7]], ids, -100)
    found = []
    for parts in ("1", "2", "4"):
        model = FlaxOPTForCausalLM.from_pretrained(TINY_SUMS, param_dtype="float32", dropout=0.0)
        options = ["--base", "float32", "--batch-size", "4", "--accumulate", parts, "--steps", "2"]
        trainer = lora_flax.AdapterTrainer(model, lora_flax.parse(options))
        loss = trainer.train(ids, labels)
        moments = jax.tree.leaves(optax.tree_utils.tree_get(trainer.moments, "mu"))
        found.append((loss, np.concatenate([np.ravel(x) for x in moments])))
    for loss, summed in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        assert np.linalg.norm(summed - found[0][1]) <= 1e-5 * np.linalg.norm(found[0][1])


@pytest.mark.parametrize(
    "options",
    [
        [],
        pytest.param(["--base", "float32", "--accumulate", "2"], marks=pytest.mark.slow),
    ],
)
def test_what_was_stopped_goes_on_exactly(tmp_path, monkeypatch, options):
    train = lora_flax.AdapterTrainer.train

    def stopped(trainer, *batch):
        if trainer.step == 5:
            raise KeyboardInterrupt
        return train(trainer, *batch)

    text = tmp_path / "text"
    text.write_text("forty-two and seventeen make fifty-nine\n" * 30)
    options = [*SHORT, "--train-file", str(text), "--block-size", "16", *options]
    whole, parts = ([*options, "--output", str(tmp_path / x)] for x in ("whole", "parts"))
    lora_flax.main(whole)
    monkeypatch.setattr(lora_flax.AdapterTrainer, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        lora_flax.main(parts)
    monkeypatch.undo()
    lora_flax.main([*parts, "--resume"])
    for file in ("state", "model.safetensors"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--targets", "nothing"], "--targets nothing: matches no linear layer"),
        (["--accumulate", "3"], "2"),
    ],
)
def test_what_cannot_be(tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        lora_flax.main([*options, "--output", str(tmp_path)])
