"""Tests that need a CUDA GPU, on commands as typed:
`make gpu-check`, or `python -m pytest -n0 -m cuda`."""

import subprocess

import pytest
import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from gpt.config import GPTConfig
from gpt.device import fits_in_memory
from gpt.files import load_pt
from gpt.generation import generate
from gpt.model import GPT
from tests.conftest import ROOT, TINY, TINY_BYTES, assert_user_error, command, environment, metrics

pytestmark = [pytest.mark.cuda,
              pytest.mark.skipif(not torch.cuda.is_available(),
                                 reason="needs a CUDA GPU (make gpu-check)")]

# a shorter run is then the beginning of a longer one
CONSTANT_LR = ["--warmup_steps", "0", "--min_lr_ratio", "1"]
# for losses near 10 in 16 bits: the order of a GPU's atomic additions differs from run to run
TOLERANCE = 2e-2


def run_new(*words, **variables: str) -> subprocess.CompletedProcess:
    """Run a command in a process that has not inherited a CUDA context."""
    return subprocess.run(command(*map(str, words)), cwd=ROOT, env=environment() | variables,
                          timeout=200, capture_output=True, text=True)


def train(data_root, log_dir, *words, launcher=("-m", "scripts.train")) -> str:
    """Train the tiny model on the GPU and return what it printed; must succeed."""
    done = run_new(*launcher, "--data_root", data_root, "--log_dir", log_dir, *TINY,
                   "--device", "cuda", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cuda" in done.stdout
    return done.stdout


def assert_same_losses(log_dir, other, train_steps, val_steps):
    for split, steps in (("train", train_steps), ("val", val_steps)):
        losses, expected = (
            {step: record["loss"] for step, record in metrics(folder, split).items()}
            for folder in (log_dir, other))
        assert list(losses) == steps and losses == pytest.approx(expected, abs=TOLERANCE), split


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_resumed_run_repeats_the_losses(data_root, tmp_path, precision):
    """Optimizer, data order and, in fp16, the loss scale are restored.
    The model learns, and peak memory is logged."""
    words = ["--precision", precision, "--compile", "false", "--eval_every", "3",
             "--sample_every", "0", *CONSTANT_LR]
    train(data_root, tmp_path / "whole", *words, "--max_steps", "6")
    train(data_root, tmp_path / "halves", *words, "--max_steps", "3")
    assert "resuming from" in train(data_root, tmp_path / "halves", *words, "--max_steps", "6")
    assert_same_losses(tmp_path / "halves", tmp_path / "whole", list(range(6)), [3, 6])
    records = metrics(tmp_path / "whole", "train")
    assert metrics(tmp_path / "whole", "val")[6]["loss"] < records[0]["loss"] - 0.3
    assert all(0 < record["peak_memory_gb"] < 4 for record in records.values())
    assert bool(load_pt(tmp_path / "whole" / "optim_00006.pt")["scaler"]) == (precision == "fp16")


def test_compiled_model_trains_like_eager_model(data_root, tmp_path):
    """With Muon, validation, samples and a resume."""
    words = ["--precision", "bf16", "--eval_every", "2", "--sample_every", "2",
             "--optimizer", "muon", *CONSTANT_LR]
    train(data_root, tmp_path / "plain", *words, "--max_steps", "4", "--compile", "false")
    printed = train(data_root, tmp_path / "compiled", *words, "--max_steps", "2",
                    "--compile", "true")
    printed += train(data_root, tmp_path / "compiled", *words, "--max_steps", "4",
                     "--compile", "true")
    assert printed.count("--- sample at step") == 2 and printed.count("val loss") == 2
    assert_same_losses(tmp_path / "compiled", tmp_path / "plain", list(range(4)), [2, 4])


def test_torchrun_trains_with_one_rank(data_root, tmp_path):
    """The defaults for precision and compilation, under torchrun."""
    train(data_root, tmp_path, "--max_steps", "2", "--eval_every", "1", "--sample_every", "2",
          "--precision", "auto",
          launcher=("torchrun", "--standalone", "--nproc_per_node=1", "-m", "scripts.train"))
    assert list(metrics(tmp_path, "train")) == [0, 1] and list(metrics(tmp_path, "val")) == [1, 2]


def test_ddp_over_nccl_accumulates_the_same_gradients(tmp_path):
    """With one rank, in a separate process, gradients equal those of the model without DDP."""
    done = run_new("-c", "from tests.test_cuda import ddp_step; "
                         f"ddp_step({str(tmp_path)!r}, 'nccl', 'cuda')")
    assert done.returncode == 0, done.stderr


def ddp_step(folder: str, backend: str, device_type: str) -> None:
    """Assert that two micro-steps under DDP accumulate the gradients of one batch without it."""
    device = torch.device(device_type, 0)
    torch.distributed.init_process_group(
        backend, init_method=f"file://{folder}/store", rank=0, world_size=1,
        device_id=device if device_type == "cuda" else None)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=256, n_layer=2, n_head=2, n_embd=32)).to(device)
    x, y = torch.randint(256, (2, 8, 32), device=device)
    model(x, y).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    ddp = DistributedDataParallel(model, device_ids=[device] if device_type == "cuda" else None)
    with ddp.no_sync():
        (ddp(x[:4], y[:4]) / 2).backward()
    (ddp(x[4:], y[4:]) / 2).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5, msg=name)
    gathered = [None]
    torch.distributed.all_gather_object(gathered, {"step": 3})
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    assert gathered == [{"step": 3}]


def test_generate_with_cuda_graphs_equals_generation_on_the_cpu():
    """Greedy and sampled, for prompts of equal and of different lengths, over the borders of the
    length classes and beyond the context."""
    torch.manual_seed(0)
    config = GPTConfig(block_size=300, vocab_size=256, n_layer=2, n_head=2, n_embd=32)
    model = GPT(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # logits that differ clearly
    for prompts in ([[1, 2, 3], [4, 5, 6]], [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11]]):
        for sampling in ({"temperature": 0}, {"temperature": 1.0, "top_k": 50, "seed": 3}):
            expected = list(generate(model.cpu(), prompts, 320, **sampling))
            assert list(generate(model.cuda(), prompts, 320, **sampling)) == expected


def test_generate_command_runs_in_both_dtypes(data_root, tmp_path):
    """With a checkpoint of a run on the GPU."""
    train(data_root, tmp_path, "--max_steps", "1", "--eval_every", "0", "--sample_every", "0",
          "--compile", "false")
    for dtype in ("float32", "bfloat16"):
        done = run_new("-m", "scripts.generate", "--log_dir", tmp_path, "--prompt", "ROMEO:",
                       "--num_samples", "2", "--max_new_tokens", "20", "--device", "cuda",
                       "--dtype", dtype)
        assert done.returncode == 0 and done.stdout.count("ROMEO:") == 2, done.stdout + done.stderr


def test_out_of_memory_advises_auto(byte_data, tmp_path):
    """8 million tokens per micro-batch at 1,024 dimensions need more than 300 GB; the first block
    alone exceeds 140. With auto, the same run fits."""
    args = ["-m", "scripts.train", "--data_root", byte_data, "--log_dir", tmp_path, *TINY_BYTES,
            "--device", "cuda", "--compile", "false", "--model.n_embd", "1024", "--seq_len", "64",
            "--total_batch_size", 2**23, "--max_steps", "1", "--eval_every", "0",
            "--sample_every", "0", "--micro_batch_size"]
    assert_user_error(run_new(*args, 2**17), "out of memory", "pass --micro_batch_size auto")
    done = run_new(*args, "auto")
    assert done.returncode == 0, done.stderr
    assert "a step is 128 x 1024 x 64 tokens" in done.stdout  # 65,536 tokens


def test_micro_batch_fits_beside_what_takes_the_memory(byte_data, tmp_path):
    """The search leaves the model, its gradients and the memory as they were, however little of
    the memory is free."""
    config = GPTConfig(block_size=64, vocab_size=256, n_layer=2, n_head=2, n_embd=512)
    model = GPT(config).to("cuda")
    autocast = torch.autocast("cuda", torch.bfloat16)
    allocated = torch.cuda.memory_allocated()
    assert fits_in_memory(model, autocast, B=16, T=64)
    assert not fits_in_memory(model, autocast, B=2**22, T=64)
    occupied = torch.empty(torch.cuda.mem_get_info()[0] - 2**28, dtype=torch.uint8, device="cuda")
    assert not fits_in_memory(model, autocast, B=2**12, T=64)
    del occupied
    assert fits_in_memory(model, autocast, B=2**12, T=64)
    assert torch.cuda.memory_allocated() == allocated
    assert all(parameter.grad is None for parameter in model.parameters())


def test_deterministic_run_is_equal_to_the_last_bit_after_a_kill(data_root, tmp_path):
    """Compiled, with dropout: losses, gradient norms and weights."""
    args = [*TINY, "--device", "cuda", "--precision", "bf16", "--deterministic", "true",
            "--compile", "true", "--model.dropout", "0.1", "--max_steps", "12", "--save_every", "4",
            "--eval_every", "2", "--sample_every", "0", "--data_root", data_root, "--log_dir"]
    assert run_new("-m", "scripts.train", *args, tmp_path / "whole").returncode == 0
    killed = run_new("tests/fault_injection.py", *args, tmp_path / "killed", FAULT="save SIGKILL")
    assert killed.returncode == -9
    assert run_new("-m", "scripts.train", *args, tmp_path / "killed").returncode == 0
    for split in ("train", "val"):
        records, expected = (
            {step: (record["loss"], record.get("grad_norm")) for step, record in
             metrics(tmp_path / name, split).items()} for name in ("killed", "whole"))
        assert records == expected
    weights, expected = (load_pt(tmp_path / name / "model_00012.pt")["model"]
                         for name in ("killed", "whole"))
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
