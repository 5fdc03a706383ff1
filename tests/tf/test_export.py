# SPDX-License-Identifier: Apache-2.0
"""SavedModels, run in a process that knows TensorFlow alone."""

from __future__ import annotations

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from opt_tf import TFOPTForQuestionAnswering, TFOPTForSequenceClassification, TFOPTModel
from tests.tf.tiny import CONFIG, IDS, MASK, RANDOM, TASK, compiled, tiny

CACHING = CONFIG.replace(use_cache=True)
#: Other numbers of rows and tokens than any the model has seen.
OTHERS = {
    name: {
        "input_ids": RANDOM.integers(3, 61, shape).astype("int32"),
        "attention_mask": np.tri(*shape, shape[1] - 1, dtype="int32")[:, ::-1],
    }
    for name, shape in {"more": (5, 9), "one": (1, 3)}.items()
}
RUN = """
import sys
import numpy as np
import tensorflow as tf
folder, target = sys.argv[1:]
loaded = tf.saved_model.load(folder)
assert not [name for name in sys.modules if name.split(".")[0] in ("opt_tf", "opt_core")]
found = {}
for name in ("more", "one"):
    with np.load(f"{target}/{name}.npz") as file:
        output = loaded.serve({key: tf.constant(file[key], tf.int32) for key in file.files})
    np.savez(f"{target}/{name}-found.npz", **{key: x.numpy() for key, x in output.items()})
"""


def run(folder, target):
    """The outputs of a SavedModel for the two batches, computed in a process of its own."""
    for name, given in OTHERS.items():
        np.savez(target / f"{name}.npz", **given)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, str(folder), str(target)],
        capture_output=True,
        text=True,
        check=False,
        cwd=target,
    )
    assert done.returncode == 0, done.stderr
    for name in OTHERS:
        with np.load(target / f"{name}-found.npz") as file:
            yield name, dict(file)


def agree(model, found):
    for name, output in found:
        expected = model(OTHERS[name], use_cache=False)
        assert output.keys() == expected.keys()
        for key, value in expected.items():
            value = tf.stack(value) if isinstance(value, tuple) else value
            np.testing.assert_allclose(output[key], value, rtol=1e-5, atol=1e-5)


def test_export(tmp_path):
    """After a training; ids and mask by default."""
    model = compiled(config=CACHING)
    model.fit(TASK, verbose=0)
    model.export(tmp_path / "exported", verbose=False)
    agree(model, run(tmp_path / "exported", tmp_path))


def test_saved_pretrained(tmp_path):
    """As the reference's: in a folder of its own beside the checkpoint, for int32 and int64 ids."""
    model = tiny(config=CACHING)
    model.save_pretrained(tmp_path, saved_model=True)
    assert (tmp_path / "model.safetensors").exists()
    loaded = tf.saved_model.load(tmp_path / "saved_model" / "1")
    expected = model(OTHERS["more"]).logits
    for kind, dtype in (("serving_default", tf.int32), ("int64_serving", tf.int64)):
        inputs = {name: tf.constant(array, dtype) for name, array in OTHERS["more"].items()}
        output = loaded.signatures[kind](**inputs)
        assert [*output] == ["logits"]
        np.testing.assert_allclose(output["logits"], expected, rtol=1e-5, atol=1e-5)
    # An id of which 32 bits would be in the vocabulary is outside all the same.
    inputs["input_ids"] += 2**32
    with pytest.raises(tf.errors.InvalidArgumentError, match="= 42949673.. is not in"):
        loaded.signatures["int64_serving"](**inputs)


def loaded_signature(folder):
    loaded = tf.saved_model.load(folder)
    return loaded, loaded.signatures["serving_default"]


def given(data):
    return {name: tf.constant(array) for name, array in data.items()}


@pytest.mark.parametrize(
    "cls", [TFOPTModel, TFOPTForSequenceClassification, TFOPTForQuestionAnswering]
)
def test_a_signature_of_every_other_class(tmp_path, cls):
    """What the configuration shows is served too, of all layers in one tensor."""
    model = tiny(cls, config=CACHING.replace(output_hidden_states=True))
    tf.saved_model.save(model, tmp_path / "saved", signatures=model.serving)
    loaded, serve = loaded_signature(tmp_path / "saved")
    output = serve(**given(OTHERS["more"]))
    assert "hidden_states" in output and "past_key_values" not in output
    agree(model, [("more", {key: value.numpy() for key, value in output.items()})])
    assert loaded is not None


def test_a_signature_of_ones_own(tmp_path):
    model = tiny(config=CACHING)

    @tf.function(input_signature=[tf.TensorSpec((None, 7), tf.int32, name="ids")])
    def best(ids):
        return {"token": tf.argmax(model(ids, use_cache=False).logits[:, -1], -1)}

    model.save_pretrained(tmp_path, saved_model=True, version=3, signatures=best)
    loaded, serve = loaded_signature(tmp_path / "saved_model" / "3")
    expected = np.argmax(model(IDS).logits[:, -1], -1)
    np.testing.assert_array_equal(serve(ids=tf.constant(IDS))["token"], expected)
    assert loaded is not None


def test_inputs_of_ones_own(tmp_path):
    model = tiny(config=CACHING)
    spec = keras.InputSpec(shape=(None, None), dtype="int32")
    model.export(tmp_path / "saved", verbose=False, input_signature=[{"input_ids": spec}])
    loaded = tf.saved_model.load(tmp_path / "saved")
    found = loaded.serve({"input_ids": tf.constant(IDS)})
    np.testing.assert_allclose(found["logits"], model(IDS).logits, rtol=1e-5, atol=1e-6)


def test_the_signature_is_the_reference_s():
    model = tiny()
    assert [*model.input_signature] == ["input_ids", "attention_mask"]
    found = model.serving(given({"input_ids": IDS, "attention_mask": MASK}))
    np.testing.assert_allclose(found["logits"], model(IDS, attention_mask=MASK).logits, rtol=1e-5)
