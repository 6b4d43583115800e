"""What surrounds a run: other runs, files that others left, closed streams, limits."""

import errno
import fcntl
import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gpt.errors import UserError
from gpt.files import run_lock
from scripts.cli import parse_args
from scripts.train import TrainConfig, main
from tests.conftest import (
    ROOT,
    RUN,
    TEXT,
    Fork,
    assert_user_error,
    command,
    environment,
    run,
    start,
    train,
)


def test_second_run_in_log_dir_is_refused(args, log_dir):
    with run_lock(log_dir):
        assert_user_error(run("-m", "scripts.train", *args), f"log_dir '{log_dir}' is in use",
                          f"by process {os.getpid()} on ", "another --log_dir")
    assert not log_dir.exists()


def test_run_stops_if_its_folder_is_replaced(args, byte_data, log_dir):
    """It neither writes to the new one nor removes it, and can be resumed in the old one."""
    done = Fork("tests/fault_injection.py", *args, FAULT="step replace_folder").result()
    assert_user_error(done, "log' was moved, removed or replaced")
    assert not list(log_dir.iterdir())
    again = train(byte_data, log_dir.with_name("moved"), *RUN)
    assert "at step 4 of 12, changed: log_dir" in again.stdout


def test_run_lock_works_on_file_systems_without_locks(log_dir, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with run_lock(log_dir) as assert_held:
        with pytest.raises(UserError, match="in use by process"), run_lock(log_dir):
            pass
        assert_held()
    assert not log_dir.exists()


def test_files_of_other_programs_stay(byte_data, log_dir):
    """A folder that a killed export left, and the temporary file of a running plot; only what a
    killed save left is removed."""
    (log_dir / ".hf.tmp").mkdir(parents=True)
    (log_dir / ".plot.png.tmp").touch()
    (log_dir / ".model_00003.pt.tmp").touch()
    train(byte_data, log_dir, *RUN)
    assert sorted(path.name for path in log_dir.glob(".*")) == [".hf.tmp", ".plot.png.tmp"]


@pytest.mark.parametrize("line", ['"$@" <&- >&- 2>&-', 'ulimit -n 100; "$@"'])
def test_run_needs_no_streams_and_few_open_files(args, log_dir, tmp_path, line):
    """Without standard streams, and on more shards than a process may have open files."""
    tokens = np.frombuffer(TEXT.read_bytes(), np.uint8)
    for index, part in enumerate(np.array_split(tokens, 300)):
        np.save(tmp_path / f"train_{index:05d}.npy", part)
    words = command("-m", "scripts.train", *args, "--data_root", tmp_path, "--eval_every", 0)
    done = subprocess.run(["bash", "-c", line, "bash", *words], cwd=ROOT, env=environment())
    assert done.returncode == 0
    assert (log_dir / "model_00012.pt").exists()


def test_prompt_and_paths_need_not_be_utf_8(data_root, tmp_path):
    prompt, log_dir = os.fsdecode(b"caf\xe9"), tmp_path / os.fsdecode(b"\xe9")
    try:
        log_dir.mkdir()
    except OSError:
        pytest.skip("this file system needs UTF-8")
    train(data_root, log_dir, "--max_steps", 1, "--sample_prompts", prompt)
    assert "\ncaf" in (log_dir / "samples.txt").read_text()


def test_ctrl_c_while_importing_shows_no_traceback(tmp_path, monkeypatch):
    """Here while the command imports a module that it always needs."""
    (tmp_path / "tyro.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = start("-m", "scripts.train")
    assert process.communicate()[0] == ""
    assert process.returncode == -signal.SIGINT


def test_main_runs_in_a_thread(args):
    """As in a notebook server: only the main thread gets signals."""
    config = parse_args(TrainConfig, list(map(str, args)))
    with ThreadPoolExecutor() as pool:
        assert pool.submit(main, config).result() == 0
