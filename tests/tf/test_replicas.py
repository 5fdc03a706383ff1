# SPDX-License-Identifier: Apache-2.0
"""Data parallelism: each device trains on its share of the batch, and the weights are those of one device."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

TRAIN = """
import json, sys
import opt_tf
import keras, numpy as np, tensorflow as tf
from tests.tf.tiny import CONFIG, IDS, MASK

replicas, more = int(sys.argv[1]), sys.argv[2] == "more"
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
LOSSES = {
    "own": None,
    "given": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
}
SHIFTED = np.repeat([[1.0] * 6 + [0.0]], 12, axis=0) * 7 / 6  # the last token has no label
UNEQUAL = np.where(np.arange(12)[:, None] < 6, IDS, np.where(np.arange(7) < 3, IDS, -100))


def train(count, loss, labels, weights=None):
    keras.utils.set_random_seed(0)
    devices = [f"CPU:{index}" for index in range(count)]
    strategy = tf.distribute.MirroredStrategy(devices) if count > 1 else tf.distribute.get_strategy()
    with strategy.scope():
        model = opt_tf.TFOPTForCausalLM(CONFIG)
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), LOSSES[loss], jit_compile=False)
    x = {"input_ids": IDS, "attention_mask": MASK}
    options = {"batch_size": 12, "shuffle": False, "verbose": 0}
    history = model.fit(x, labels, epochs=2, sample_weight=weights, **options)
    return model.get_weights(), history.history["loss"]


def difference(left, right):
    weights = max(float(np.abs(a - b).max()) for a, b in zip(left[0], right[0]))
    return weights, max(abs(a - b) for a, b in zip(left[1], right[1]))


found = {"own": difference(one := train(1, "own", IDS), train(replicas, "own", IDS))}
if more:
    found["given"] = difference(one, train(2, "given", np.roll(IDS, -1, 1), SHIFTED))
    one = train(1, "own", UNEQUAL)
    found["unequal"] = difference(one, train(2, "own", UNEQUAL))
    # Rows weighed by how many labels they share among their replica, and among all.
    counts = (UNEQUAL[:, 1:] != -100).sum(1).reshape(2, 6).sum(1)
    weights = np.repeat(counts / counts.mean(), 6).astype("float32")
    found["weighed"] = difference(one, train(2, "own", UNEQUAL, weights))
print(json.dumps(found))
"""


@functools.cache
def differences(replicas, extent):
    """Largest differences of weights and of losses, by what was trained."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRAIN, str(replicas), extent],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("replicas", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_replicas_train_as_one(replicas):
    """A loss that is not divided by their number counts as often."""
    weights, losses = differences(replicas, "least")["own"]
    assert weights < 1e-6
    assert losses < 1e-5


@pytest.mark.slow
def test_another_loss_of_replicas():
    weights, losses = differences(2, "more")["given"]
    assert weights < 1e-6
    assert losses < 1e-5


@pytest.mark.slow
def test_each_replica_takes_the_mean_of_its_own_labels():
    """As Keras' losses do; weights of rows make up for it."""
    found = differences(2, "more")
    assert found["unequal"][0] > 1e-4
    assert found["weighed"][0] < 1e-6
