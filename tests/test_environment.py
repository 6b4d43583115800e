"""What surrounds a run: other runs, files that others left, closed streams, terminals, limits."""

import errno
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading

import numpy as np
import pytest

from gpt.errors import UserError
from gpt.files import run_lock
from scripts import train
from scripts.cli import parse_args
from tests.conftest import (
    ROOT,
    RUN,
    TEXT,
    TINY_BYTES,
    assert_user_error,
    command,
    environment,
    metrics,
    run,
    start,
)


@pytest.fixture
def args(byte_data, tmp_path):
    """Return the flags of RUN, without validation, in a new folder."""
    return ["--data_root", byte_data, "--log_dir", tmp_path / "log", *RUN, "--eval_every", "0"]


def shell(line, *words):
    """Run a bash command line in which "$@" is `words`."""
    return subprocess.run(["bash", "-c", line, "bash", *command(*map(str, words))], cwd=ROOT,
                          env=environment(), timeout=120, capture_output=True, text=True)


def test_second_run_in_log_dir_is_refused(args, tmp_path):
    with run_lock(tmp_path / "log"):
        assert_user_error(run("-m", "scripts.train", *args), f"log_dir '{tmp_path}/log' is in use",
                          f"by process {os.getpid()} on ", "another --log_dir")
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("replaced", [False, True])
def test_run_stops_if_its_folder_is_moved(args, tmp_path, replaced):
    """Another run may have begun in its place: that one keeps its files and its lock."""
    process = start("-m", "scripts.train", *args, "--max_steps", "1000000",
                    stderr=subprocess.PIPE)
    for line in process.stdout:
        if line.startswith("step 5 "):
            (tmp_path / "log").rename(tmp_path / "moved")
            break
    if replaced:
        (tmp_path / "log").mkdir()
        with run_lock(tmp_path / "log") as assert_held:
            _, error = process.communicate(timeout=60)
            assert_held()
            assert sorted(path.name for path in (tmp_path / "log").iterdir()) == [
                ".lock", ".lock_owner"]
        assert (tmp_path / "log").exists()
    else:
        _, error = process.communicate(timeout=60)
        assert not (tmp_path / "log").exists()
    assert process.returncode == 2
    assert re.fullmatch(r"error: log_dir .* was moved, removed or replaced: .*\n", error)
    args[args.index("--log_dir") + 1] = tmp_path / "moved"
    assert "resuming from" in run("-m", "scripts.train", *args).stdout


def test_run_lock_keeps_the_empty_folder_of_somebody_else(tmp_path):
    with run_lock(tmp_path / "log") as assert_held:
        (tmp_path / "log").rename(tmp_path / "moved")
        (tmp_path / "log").mkdir()
        with pytest.raises(UserError, match="was moved, removed or replaced"):
            assert_held()
    assert (tmp_path / "log").exists()


def test_run_lock_works_on_file_systems_without_locks(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with run_lock(tmp_path / "log") as assert_held:
        assert_held()
        with pytest.raises(UserError, match="in use by process"), run_lock(tmp_path / "log"):
            pass
        assert_held()
    assert not (tmp_path / "log").exists()


def test_files_of_other_programs_stay(args, tmp_path):
    """A folder that a killed export left, and the temporary file of a running plot; only what a
    killed save left is removed."""
    log_dir = tmp_path / "log"
    (log_dir / ".hf.tmp").mkdir(parents=True)
    (log_dir / ".plot.png.tmp").touch()
    (log_dir / ".model_00003.pt.tmp").touch()
    assert run("-m", "scripts.train", *args).returncode == 0
    assert sorted(path.name for path in log_dir.glob(".*")) == [".hf.tmp", ".plot.png.tmp"]


def test_failed_start_leaves_no_folder(args, tmp_path):
    args[args.index("--data_root") + 1] = tmp_path / "missing"
    assert_user_error(run("-m", "scripts.train", *args), "missing' has no train_*.npy")
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_standard_streams_may_be_closed(args, tmp_path, closed):
    done = shell(f'"$@" {closed}', "-m", "scripts.train", *args)
    assert done.returncode == 0, done.stderr
    assert list(metrics(tmp_path / "log", "train")) == list(range(12))


def test_prompt_and_paths_need_not_be_utf_8(data_root, tmp_path):
    prompt, log_dir = os.fsdecode(b"caf\xe9"), tmp_path / os.fsdecode(b"\xe9")
    done = shell('"$@"', "-m", "scripts.train", "--data_root", data_root, "--log_dir", log_dir,
                 *TINY_BYTES, "--model.vocab_size", "0", "--max_steps", "2", "--sample_every", "1",
                 "--sample_prompts", prompt)
    assert done.returncode == 0, done.stderr
    assert (log_dir / "samples.txt").read_text().count("\ncaf") == 2


def test_yaml_strings_are_never_flags(tmp_path):
    (tmp_path / "run.yaml").write_text('sample_prompts: ["a", "--x", "-1"]\n')
    config = parse_args(train.TrainConfig, ["--config", str(tmp_path / "run.yaml")])
    assert config.sample_prompts == ["a", "--x", "-1"]


def test_expected_time_is_printed_before_the_first_step(args):
    lines = run("-m", "scripts.train", *args).stdout.splitlines()
    expected = next(i for i, line in enumerate(lines) if line.startswith("12 steps take about "))
    first = next(i for i, line in enumerate(lines) if line.startswith("step 0 "))
    assert re.fullmatch(r"12 steps take about 0:00:\d\d at 30% MFU", lines[expected])
    assert expected < first


def test_ctrl_c_while_importing_shows_no_traceback():
    process = subprocess.Popen([sys.executable, "-X", "importtime", "-m", "scripts.train"],
                               cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.rstrip().endswith(" torch._utils"):
            process.send_signal(signal.SIGINT)
            break
    assert "Traceback" not in process.stderr.read()
    assert process.wait() == -signal.SIGINT


def test_main_runs_in_a_thread(args):
    """As in a notebook server: only the main thread gets signals."""
    config = parse_args(train.TrainConfig, list(map(str, args)))
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(train.main(config)))
    thread.start()
    thread.join()
    assert statuses == [0]


@pytest.mark.parametrize("columns, shown, hidden", [
    (0, "step 11 |", "12/12"), (120, "12/12", "step 11 |")])
def test_terminal_shows_a_bar_or_lines(args, columns, shown, hidden):
    """A bar with loss, speed and time left, but lines on a terminal without a size."""
    terminal, program_side = pty.openpty()
    fcntl.ioctl(program_side, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = start("-m", "scripts.train", *args, stdout=program_side, stderr=program_side)
    os.close(program_side)
    printed = b""
    try:
        while part := os.read(terminal, 65536):
            printed += part
    except OSError:  # the program has closed its side
        pass
    os.close(terminal)
    assert process.wait() == 0
    assert shown in printed.decode() and hidden not in printed.decode()


def test_more_shards_than_open_files(args, tmp_path):
    tokens = np.frombuffer(TEXT.read_bytes(), np.uint8)
    (tmp_path / "data").mkdir()
    for index, part in enumerate(np.array_split(tokens, 300)):
        np.save(tmp_path / "data" / f"train_{index:05d}.npy", part)
    args[args.index("--data_root") + 1] = tmp_path / "data"
    done = shell('ulimit -n 100; "$@"', "-m", "scripts.train", *args)
    assert done.returncode == 0, done.stderr
    assert "found 300 shards for split train" in done.stdout


def test_each_start_records_where_it_runs(args, tmp_path):
    for max_steps in ("6", "12"):
        assert run("-m", "scripts.train", *args, "--max_steps", max_steps).returncode == 0
    starts = metrics(tmp_path / "log", "start")
    assert list(starts) == [0, 6]
    assert starts[6].keys() == {"step", "split", "commit", "torch", "device", "ranks"}
    assert starts[6]["ranks"] == 1 and starts[6]["device"].startswith("cpu")
