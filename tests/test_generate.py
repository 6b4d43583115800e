"""scripts/generate.py, as typed."""

import shutil
import subprocess

import pytest

from tests.conftest import assert_refused, run, start, train


@pytest.fixture(scope="module")
def log_dir(data_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(data_root, folder, "--max_steps", "3", "--save_every", "1", "--eval_every", "0", "--sample_every", "0")
    return folder


def generate(log_dir, *words):
    done = run("-m", "scripts.generate", "--log_dir", log_dir, "--device", "cpu", "--max_new_tokens", "40", *words)
    assert done.returncode == 0, done.stderr
    return done


def test_it_takes_the_newest_checkpoint_and_says_which(log_dir):
    """Only the text goes to standard output; 40 tokens go beyond the context of 32."""
    done = generate(log_dir, "--prompt", "MENENIUS:")
    assert done.stdout.startswith("MENENIUS:") and len(done.stdout) > 60
    assert done.stderr == f"{log_dir}/model_00003.pt: step 3\n"


def test_the_same_seed_writes_the_same_text(log_dir):
    """And another one, from another checkpoint, another text; greedy texts are all the same."""
    first = generate(log_dir, "--num_samples", "2").stdout
    assert first.count("\n---\n") == 1 and len(set(first.split("\n---\n"))) == 2
    assert generate(log_dir, "--num_samples", "2").stdout == first
    other = generate(log_dir, "--num_samples", "2", "--seed", "1", "--checkpoint", log_dir / "model_00001.pt")
    assert other.stdout != first and "step 1" in other.stderr
    greedy = generate(log_dir, "--temperature", "0", "--num_samples", "2").stdout.removesuffix("\n").split("\n---\n")
    assert len(greedy) == 2 and greedy[0] == greedy[1]


def test_a_reader_that_has_seen_enough(log_dir):
    """`| head -0`: no traceback."""
    process = start("-m", "scripts.generate", "--device", "cpu", "--log_dir", log_dir, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == f"{log_dir}/model_00003.pt: step 3\n"
    assert process.wait() == 141


def test_a_damaged_newest_checkpoint_is_passed_over(log_dir, tmp_path):
    """With its name, so that nobody wonders."""
    copy = shutil.copytree(log_dir, tmp_path / "copy")
    newest = copy / "model_00003.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    done = generate(copy)
    assert "model_00003.pt is damaged" in done.stderr and "model_00002.pt: step 2" in done.stderr
    assert_refused(run("-m", "scripts.generate", "--checkpoint", newest), "model_00003.pt is damaged")
