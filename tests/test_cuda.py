"""Tests that need a CUDA GPU, on commands as typed: `python -m pytest -n0 -m cuda`."""

import subprocess
from functools import partial

import pytest
import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from gpt.config import GPTConfig
from gpt.device import fits_in_memory
from gpt.files import load_pt
from gpt.generation import generate
from gpt.model import GPT
from tests.conftest import ROOT, TINY, assert_user_error, command, environment, metrics

pytestmark = [pytest.mark.cuda,
              pytest.mark.skipif(not torch.cuda.is_available(),
                                 reason="needs a CUDA GPU (make gpu-check)")]

# a shorter run is then the beginning of a longer one
CONSTANT_LR = "--warmup_steps 0 --min_lr_ratio 1"
# for losses near 10 in 16 bits: the order of a GPU's atomic additions differs from run to run
TOLERANCE = 2e-2


def run_new(*words, **variables: str) -> subprocess.CompletedProcess:
    """Run a command in a process that has not inherited a CUDA context."""
    return subprocess.run(command(*map(str, words)), cwd=ROOT, env=environment() | variables,
                          capture_output=True, text=True)


def train(data_root, log_dir, flags, program="-m scripts.train", status=0, **variables):
    """Train the tiny model on the GPU, without compilation and samples unless `flags` say so. The
    command must end with this status."""
    flags = f"--device cuda --compile false --sample_every 0 {flags}"
    done = run_new(*program.split(), "--data_root", data_root, "--log_dir", log_dir, *TINY,
                   *flags.split(), **variables)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def small_model(block_size, n_embd=32):
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=block_size, vocab_size=256, n_layer=2, n_head=2, n_embd=n_embd))


def losses(log_dir):
    return {(split, step): record["loss"] for split in ("train", "val")
            for step, record in metrics(log_dir, split).items()}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_resumed_run_repeats_the_losses(data_root, tmp_path, precision):
    """Optimizer and data order are restored; in fp16 the loss scale is saved. The model learns, and
    peak memory is logged."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    flags = f"--precision {precision} --eval_every 3 {CONSTANT_LR} --max_steps"
    train(data_root, whole, f"{flags} 6")
    train(data_root, halves, f"{flags} 3")
    assert "resuming from" in train(data_root, halves, f"{flags} 6").stdout
    assert losses(halves) == pytest.approx(losses(whole), abs=TOLERANCE)
    first = metrics(whole, "train")[0]
    assert metrics(whole, "val")[6]["loss"] < first["loss"] - 0.3
    assert 0 < first["peak_memory_gb"] < 4
    assert bool(load_pt(whole / "optim_00006.pt")["scaler"]) == (precision == "fp16")


def test_compiled_model_trains_like_eager_model(data_root, tmp_path):
    """With Muon, validation, samples and a resume."""
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    flags = f"--precision bf16 --optimizer muon --eval_every 2 {CONSTANT_LR} --max_steps"
    train(data_root, eager, f"{flags} 4")
    for steps in (2, 4):
        done = train(data_root, compiled, f"{flags} {steps} --compile true --sample_every 2")
        assert f"--- sample at step {steps}" in done.stdout
    assert losses(compiled) == pytest.approx(losses(eager), abs=TOLERANCE)


def test_torchrun_trains_a_model_that_generates_in_both_dtypes(data_root, tmp_path):
    """With one rank, and the defaults for precision and compilation."""
    train(data_root, tmp_path, "--precision auto --compile auto --max_steps 2 --eval_every 1",
          program="torchrun --standalone --nproc_per_node=1 -m scripts.train")
    assert list(metrics(tmp_path, "val")) == [1, 2]
    for dtype in ("float32", "bfloat16"):
        flags = f"--prompt ROMEO: --max_new_tokens 20 --num_samples 2 --device cuda --dtype {dtype}"
        done = run_new("-m", "scripts.generate", "--log_dir", tmp_path, *flags.split())
        assert done.stdout.count("ROMEO:") == 2, done.stderr


def test_ddp_over_nccl_accumulates_the_gradients_of_the_whole_batch(tmp_path):
    """With one rank, for which scripts.train uses no DDP."""
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0,
                                         world_size=1, device_id=torch.device("cuda", 0))
    model = small_model(32).cuda()
    x, y = torch.randint(256, (2, 8, 32), device="cuda")
    model(x, y).backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    ddp = DistributedDataParallel(model)
    with ddp.no_sync():
        (ddp(x[:4], y[:4]) / 2).backward()
    (ddp(x[4:], y[4:]) / 2).backward()
    torch.distributed.destroy_process_group()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"top_k": 50, "seed": 3}])
@pytest.mark.parametrize("prompts", [[[1, 2, 3], [4, 5, 6]], [[*range(7)], [8], [9, 10, 11]]])
def test_generate_with_cuda_graphs_equals_generation_on_the_cpu(prompts, sampling):
    """Over the borders of the length classes and beyond the context."""
    model = small_model(300).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # logits that differ clearly
    expected = list(generate(model, prompts, 320, **sampling))
    assert list(generate(model.cuda(), prompts, 320, **sampling)) == expected


def test_out_of_memory_advises_auto(byte_data, tmp_path):
    """8 million tokens per micro-batch at 1,024 dimensions need more than 300 GB; the first block
    alone exceeds 140. With auto, the same run fits."""
    flags = (f"--model.n_embd 1024 --model.vocab_size 256 --seq_len 64 --max_steps 1 "
             f"--eval_every 0 --total_batch_size {2**23} --micro_batch_size")
    done = train(byte_data, tmp_path, f"{flags} {2**17}", status=2)
    assert_user_error(done, "out of memory", "pass --micro_batch_size auto")
    done = train(byte_data, tmp_path, f"{flags} auto")
    assert "a step is 128 x 1024 x 64 tokens" in done.stdout  # 65,536 tokens


def test_micro_batch_fits_beside_what_takes_the_memory():
    """The search leaves the model, its gradients and the memory as they were, however little of
    the memory is free."""
    model = small_model(64, n_embd=512).cuda()
    fits = partial(fits_in_memory, model, torch.autocast("cuda", torch.bfloat16), T=64)
    assert fits(B=16)  # and cuBLAS has its workspaces
    allocated = torch.cuda.memory_allocated()
    assert not fits(B=2**22)
    occupied = torch.empty(torch.cuda.mem_get_info()[0] - 2**28, dtype=torch.uint8, device="cuda")
    assert not fits(B=2**12)
    del occupied
    assert fits(B=2**12)
    assert torch.cuda.memory_allocated() == allocated
    assert all(parameter.grad is None for parameter in model.parameters())


def test_deterministic_run_is_equal_to_the_last_bit_after_a_kill(data_root, tmp_path):
    """Compiled, with dropout: losses and weights."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = ("--precision bf16 --deterministic true --compile true --model.dropout 0.1 "
             "--max_steps 12 --save_every 4 --eval_every 2")
    train(data_root, whole, flags)
    train(data_root, killed, flags, program="tests/fault_injection.py", status=-9,
          FAULT="save SIGKILL")
    train(data_root, killed, flags)
    assert losses(killed) == losses(whole)
    weights, expected = (load_pt(folder / "model_00012.pt")["model"] for folder in (killed, whole))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
