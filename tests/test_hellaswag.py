"""gpt/hellaswag.py: the same predictions as the usual way, and the command."""

import base64
import json
import math
import signal
import time
from pathlib import Path

import pytest
import torch

from gpt import hellaswag
from gpt.config import GPTConfig
from gpt.distributed import Distributed
from gpt.model import GPT
from gpt.tokenizer import Tokenizer
from tests import plain_hellaswag
from tests.conftest import TINY, Fork, assert_refused, metrics, run, run_ranks, start
from tests.plain_hellaswag import make_examples

DATA = Path(__file__).parent / "data" / "hellaswag.jsonl"  # our own examples in the original format


# A tokenizer of single bytes: fast, and its sequences are four times as long.
BYTES = Tokenizer("".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)))


def model(block_size=1024, std=0.1):
    torch.manual_seed(0)
    net = GPT(GPTConfig(block_size=block_size, vocab_size=257, n_layer=2, n_head=4, n_embd=48)).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return net


@pytest.mark.parametrize("block_size, rows", [(1024, {1}), (300, {1, 4}), (100, {1, 4}), (12, {4}), (1, {4})])
def test_predictions_are_those_of_the_usual_way(block_size, rows):
    """One ending at a time over full logits gives the same scores and choices, with contexts and endings cut too."""
    net, examples = model(block_size), hellaswag.load_examples(str(DATA)) + make_examples(12)
    expected = [plain_hellaswag.predict(net, BYTES, example) for example in examples]
    groups = [hellaswag.make_rows(i, example, BYTES, net.config) for i, example in enumerate(examples)]
    assert {len(group) for group in groups} == rows
    for batch_tokens in (1, 3000, 100_000):
        scores = dict(hellaswag.score(net, groups, batch_tokens))
        for i, (_, _, sums, means) in enumerate(expected):
            assert torch.allclose(scores[i], torch.stack([sums, means]), rtol=1e-5, atol=1e-4), (i, batch_tokens)
        predictions = hellaswag.predict(net, BYTES, examples, batch_tokens, torch.float32)
        assert predictions.tolist() == [list(choice[:2]) for choice in expected]
        assert len(set(predictions.flatten().tolist())) > 1


def test_predict_runs_in_the_given_dtype():
    """bfloat16 scores are near the float32 ones, and not the same."""
    net, examples = model(std=0.02), make_examples(24)
    scores = {dtype: {} for dtype in (torch.float32, torch.bfloat16)}
    for dtype, found in scores.items():
        hellaswag.predict(net, BYTES, examples, 8192, dtype, found.setdefault)
    for i, exact in scores[torch.float32].items():
        assert torch.allclose(scores[torch.bfloat16][i], exact, rtol=1e-2)
        assert not torch.equal(scores[torch.bfloat16][i], exact)


def test_labels_are_only_used_to_count():
    """Accuracy is the share of predictions that equal the labels; standard errors are those of a proportion."""
    net, examples = model(), make_examples(30)
    predictions = hellaswag.predict(net, BYTES, examples, 1000, torch.float32)
    result = hellaswag.evaluate(net, BYTES, examples, Distributed(0, 1, torch.device("cpu")), torch.float32)
    labels = torch.tensor([example.label for example in examples])
    for name, column in (("acc", 0), ("acc_norm", 1)):
        p = (predictions[:, column] == labels).double().mean().item()
        assert result[name] == pytest.approx(p)
        assert result[f"{name}_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 29))
    assert result["examples"] == 30


@pytest.fixture(scope="module")
def log_dir(data_root, tmp_path_factory):
    """A short run that looks at HellaSwag at steps 2 and 4, and at the end."""
    folder = tmp_path_factory.mktemp("run")
    done = run("-m", "scripts.train", "--data_root", data_root, "--log_dir", folder, *TINY, "--max_steps", "5",
               "--sample_every", "0", "--eval_every", "0", "--hellaswag_every", "2", "--hellaswag_data", DATA)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("hellaswag acc ") == 3 and "| examples: 8" in done.stdout
    return folder


def test_training_looks_at_it(log_dir):
    """The record in metrics.jsonl is what the command says of the same checkpoint."""
    records = metrics(log_dir, "hellaswag")
    assert sorted(records) == [2, 4, 5] and records[5]["examples"] == 8
    done = run("-m", "scripts.eval_hellaswag", "--log_dir", log_dir, "--data", DATA, "--precision", "float32")
    assert done.returncode == 0 and "8 examples | acc " in done.stdout, done.stderr
    result = json.loads((log_dir / "hellaswag.json").read_text())
    assert result["checkpoint"].endswith("model_00005.pt") and result["data"] == str(DATA)
    assert {name: result[name] for name in ("acc", "acc_norm", "acc_stderr")} == {
        name: records[5][name] for name in ("acc", "acc_norm", "acc_stderr")}


def test_ranks_share_the_examples(log_dir, tmp_path):
    """Each example once, whatever the number of processes, also where a process has none."""
    words = ["--data", DATA, "--device", "cpu", "--checkpoint", log_dir / "model_00005.pt", "--log_dir", tmp_path]

    def result(done):
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / "hellaswag.json").read_text())

    one = result(run("-m", "scripts.eval_hellaswag", *words))
    assert one["examples"] == 8
    assert result(run("torchrun", "--standalone", "--nproc_per_node=2", "scripts/eval_hellaswag.py", *words)) == one
    one = result(run("-m", "scripts.eval_hellaswag", *words, "--limit", "2"))
    assert one["examples"] == 2
    assert result(run_ranks(3, "-m", "scripts.eval_hellaswag", *words, "--limit", "2")[0]) == one


def test_a_signal_ends_it(data_root, tmp_path):
    """In the middle of an evaluation that would take minutes: saved, and looked at again after the restart."""
    (tmp_path / "many.jsonl").write_text(DATA.read_text() * 200)
    words = ["-m", "scripts.train", "--data_root", data_root, *TINY, "--max_steps", "3", "--sample_every", "0",
             "--eval_every", "2", "--hellaswag_every", "2", "--log_dir", tmp_path / "log"]
    process = start(*words, "--hellaswag_data", tmp_path / "many.jsonl")
    while "val loss" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode == 143 and time.monotonic() - began < 20
    assert (tmp_path / "log" / "model_00002.pt").exists()
    done = run(*words, "--hellaswag_data", DATA)
    assert done.returncode == 0 and done.stdout.count("hellaswag acc") == 2, done.stdout + done.stderr
    assert sorted(metrics(tmp_path / "log", "val")) == sorted(metrics(tmp_path / "log", "hellaswag")) == [2, 3]


def test_examples_of_the_original_format(tmp_path):
    """Text and label as the file has them, also where, as in the hub's copy, the label is text; limit: the first."""
    examples = hellaswag.load_examples(str(DATA))
    assert len(examples) == 8 and [e.label for e in examples] == [0, 2, 1, 0, 3, 1, 2, 3]
    assert examples[0].context == "A man turns a bicycle upside down on the lawn. he"
    lines = DATA.read_text().replace('"label": 3', '"label": "3"')
    (tmp_path / "text.jsonl").write_text("\ufeff" + lines + "\n\n")
    assert hellaswag.load_examples(str(tmp_path / "text.jsonl")) == examples
    (tmp_path / "line.jsonl").write_text('{"ctx": "a\u2028b", "endings": ["c", "d"], "label": 1}\n')
    assert hellaswag.load_examples(str(tmp_path / "line.jsonl")) == [hellaswag.Example("a\u2028b", ["c", "d"], 1)]
    assert hellaswag.load_examples(str(DATA), limit=3) == examples[:3]


def test_without_a_network_it_says_what_to_pass(log_dir):
    """One line, that names --data."""
    done = Fork("-m", "scripts.eval_hellaswag", "--log_dir", log_dir, HF_HUB_OFFLINE=1, HF_HOME=log_dir).result()
    assert_refused(done, "--data", "hellaswag_val.jsonl")
