# SPDX-License-Identifier: Apache-2.0
"""The command and its workers as processes: what they import, write, and how they end."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from opt_core import OPTError
from opt_zoo import processes, worker
from opt_zoo.backends import Framework
from opt_zoo.prompts import Prompts
from opt_zoo.worker import Request

ROOT = Path(__file__).parent.parent.parent
COMMAND = (sys.executable, "-P", "-m", "opt_zoo")
GENERATE = (*COMMAND, "generate", "--framework", "torch", "--max-new-tokens", "2")


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    return subprocess.run(
        arguments, capture_output=True, check=False, env=environment, timeout=120, **options
    )


def request(model: Path, **options: object) -> Request:
    return Request(Framework.TORCH, str(model), Prompts.encode(model, ["one"]).inputs, options)


def test_no_file_of_the_current_directory_is_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("numpy", "torch", "opt_core"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('poisoned')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)  # the source tree, not installed
    assert processes.run(request(model, max_new_tokens=1)).sequences
    done = run(*GENERATE, "--model", str(model), "--prompt", "one", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_worker_of_tensorflow_has_keras_on_tensorflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    assert processes._environment(Framework.TF)["KERAS_BACKEND"] == "tensorflow"
    assert processes._environment(Framework.TORCH)["KERAS_BACKEND"] == "jax"


def test_lines_from_windows_and_an_output_that_is_not_utf8(model: Path) -> None:
    options = ("--model", str(model), "--json")
    lines = run(*GENERATE, *options, input=b"one plus\r\n\r\ntwo\r\n")
    assert [row["prompt"] for row in json.loads(lines.stdout)] == ["one plus", "two"]
    text = "caf\N{LATIN SMALL LETTER E WITH ACUTE} is"
    ascii_only = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = run(*GENERATE, "--model", str(model), "--prompt", text, env=ascii_only)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"caf\\xe9 is")


def test_a_prompt_that_is_no_text(model: Path) -> None:
    done = run(*GENERATE, "--model", str(model), input=b"caf\xe9\n")
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: Prompt 'caf\\udce9': expected text")


def test_a_seed_out_of_range_is_refused_before_the_model_is_looked_for() -> None:
    done = run(*GENERATE, "--model", "/no/such", "--prompt", "one", "--seed", str(2**70))
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: seed: expected a whole number from 0 to 2**32 - 1")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="POSIX signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGKILL"])
def test_the_worker_ends_with_the_command(name: str, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import signal, sys\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # under nohup it is ignored
        "from opt_zoo import processes, terminal\n"
        "from opt_zoo.worker import Request\n"
        # a worker that answers nothing for a minute, but for its own process id
        "code = '''import os, sys, threading, time\n"
        "from opt_zoo import worker\n"
        "sys.stdin.readline()\n"
        "threading.Thread(target=worker._end_with_stdin, daemon=True).start()\n"
        'print(\\\'{"event": "pid", "pid": %d}\\\' % os.getpid(), flush=True)\n'
        "time.sleep(60)'''\n"
        "processes.COMMAND = (sys.executable, '-P', '-c', code)\n"
        "terminal.prepare()\n"
        "processes.run(Request('torch', '', {}, {}), lambda e: print(e['pid'], flush=True))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        number = getattr(signal, name)
        parent.send_signal(number)
        code = parent.wait(timeout=30)
    assert code == (-number if name == "SIGKILL" else 128 + number)
    deadline = time.monotonic() + 10
    while _runs(pid):
        assert time.monotonic() < deadline, "the worker outlived the command"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # a zombie that nobody has waited for has ended too
    return not (stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def test_warnings_for_the_user_are_events(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, str]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", lambda *_, **__: None)
        worker._send_warnings(lambda event, message: sent.append((event, message)))
        warnings.warn("for people", stacklevel=1)
        warnings.warn("for programmers", DeprecationWarning, stacklevel=1)
    assert sent == [("warning", "for people")]


def test_warnings_reach_the_terminal(model: Path) -> None:
    given = ("--prompt", "one", "--temperature", "2")  # without --do-sample: of no effect
    done = run(*GENERATE, "--model", str(model), *given)
    assert done.returncode == 0
    assert b"PyTorch: warning: " in done.stderr and b"temperature" in done.stderr


def test_the_best_of_several_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def best(*durations: float) -> float:
        ticks = iter([0.0, *np.repeat(np.cumsum(durations), 2)])
        monkeypatch.setattr(worker.time, "perf_counter", lambda: float(next(ticks)))
        return worker.best_seconds(lambda: None)

    assert best(2.0) == 2.0  # one is enough where it takes half a second
    assert best(0.25, 0.125, 0.25) == 0.125
    assert best(*[0.03125] * 9, 0.0078125) == 0.0078125


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", save)
    with pytest.raises(OPTError, match=r"room for 16 bytes.*No space left.*TMPDIR"):
        worker._save(tmp_path / "logits.npy", np.zeros(4, np.float32))
