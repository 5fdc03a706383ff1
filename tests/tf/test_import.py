# SPDX-License-Identifier: Apache-2.0
"""`import opt_tf` puts Keras on TensorFlow, or says what stands in the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHOW = "import os, keras; print(keras.config.backend(), os.environ.get('KERAS_BACKEND'))"


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "KERAS_BACKEND"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**env, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_configuration_file_does_not_matter(tmp_path: Path) -> None:
    """And the environment is left as it was."""
    (tmp_path / "keras.json").write_text('{"backend": "jax"}')
    done = python(f"import opt_tf; {SHOW}", KERAS_HOME=str(tmp_path))
    assert done.stdout.split() == ["tensorflow", "None"], done.stderr


def test_tensorflow_first() -> None:
    assert python(f"import tensorflow, opt_tf; {SHOW}").stdout.split()[0] == "tensorflow"


def test_another_backend_in_the_environment() -> None:
    done = python("import opt_tf", KERAS_BACKEND="jax")
    assert done.returncode == 1
    assert "ImportError: opt_tf runs Keras 3 on TensorFlow, but KERAS_BACKEND='jax'" in done.stderr
    assert "KERAS_BACKEND=tensorflow" in done.stderr


def test_keras_already_on_another_backend() -> None:
    done = python("import keras, opt_tf", KERAS_BACKEND="jax")
    assert done.returncode == 1
    assert "keras was already imported on its 'jax' backend" in done.stderr
    assert "KERAS_BACKEND=tensorflow" in done.stderr


def test_tensorflow_is_not_installed() -> None:
    hide = "import importlib.util as u; f = u.find_spec; "
    hide += "u.find_spec = lambda name, *a: None if name == 'tensorflow' else f(name, *a); "
    done = python(hide + "import opt_tf")
    assert done.returncode == 1
    assert "ImportError: opt_tf needs TensorFlow: pip install 'opt-zoo[tf]'" in done.stderr
