"""GPT-2 in Hugging Face's format, through `transformers`: load it from a folder or from the Hub,
and save it to a folder."""

import logging
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from gpt.config import GPTConfig
from gpt.errors import UserError
from gpt.tokenizer import Tokenizer

# Settings that change what a model computes, with the values gpt/model.py supports;
# the first one is the default.
SUPPORTED_VALUES = {
    "model_type": ("gpt2",),
    # All are GELU's tanh approximation.
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
}
# Stored as (in, out), since transformers' GPT-2 has Conv1D layers:
# transposed here and nowhere else.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

SIZES = ("vocab_size", "n_layer", "n_head", "n_embd")  # same names in both configs


def load_pretrained(name_or_path: str | Path) -> dict:
    """Return a model as a step-0 checkpoint, float32 on the CPU.

    name_or_path: a folder, or a name on the Hub. Raises UserError if it is missing, damaged or
    unsupported.
    """
    hf_model, folder = load_hf_model(name_or_path)
    sizes = {name: getattr(hf_model.config, name) for name in SIZES}
    config = GPTConfig(block_size=hf_model.config.n_positions, **sizes)
    weights = hf_model.transformer.state_dict()
    del hf_model  # below, memory holds each weight once
    transpose(weights)
    for name, tensor in weights.items():
        if not tensor.sum().isfinite():  # isfinite().all() would allocate booleans
            raise UserError(f"cannot load {str(name_or_path)!r}: {name} has infinite or NaN values")
    try:
        tokenizer = find_tokenizer(folder, config.vocab_size)
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"the tokenizer in {folder} is damaged ({error})") from None
    return {"model": weights, "config": asdict(config), "step": 0, "tokenizer": tokenizer}


def transpose(weights: dict[str, torch.Tensor]) -> None:
    """Transpose the matrices of the blocks in place, one after the other; all become float32."""
    for name in list(weights):
        tensor = weights.pop(name).float()
        weights[name] = tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor


def load_hf_model(name_or_path: str | Path) -> tuple[Any, Path]:
    """Return the `GPT2LMHeadModel` of a folder or a name on the Hub, float32 on the CPU, and its
    folder.

    Raises UserError if it is missing, damaged, or not the model of gpt/model.py.
    """
    from transformers import GPT2Config, GPT2LMHeadModel  # takes seconds
    from transformers.utils.logging import disable_progress_bar

    folder = Path(name_or_path)
    weight_file = folder / "model.safetensors"
    try:
        logging.disable()  # transformers would report missing weights, too
        if not folder.is_dir():
            folder = download_snapshot(str(name_or_path))
        disable_progress_bar()
        if not (folder / "config.json").is_file():
            raise ValueError("it has no config.json")
        settings, _ = GPT2Config.get_config_dict(folder)
        for name, supported in SUPPORTED_VALUES.items():
            value = settings.get(name, supported[0])
            if value not in supported:
                raise ValueError(f"{name} {value!r} is not supported, expected {supported[0]!r}")
        if weight_file.is_file() and weight_file.stat().st_size < 200:
            raise ValueError("model.safetensors is empty or a Git LFS pointer, run `git lfs pull`")
        loader: Any = GPT2LMHeadModel  # its type hints omit the loading info
        model, found = loader.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True)
        for problem in ("missing", "mismatched", "unexpected"):
            names = [name for name in found[f"{problem}_keys"] if "masked_bias" not in name]
            if names:
                raise ValueError(f"{problem} weight {min(names)}")
        if model.lm_head.weight is not model.transformer.wte.weight:
            raise ValueError("lm_head.weight differs from wte.weight, only tied weights are "
                             "supported")
    except Exception as error:  # the network, the Hub, the disk, or a damaged file
        reason = re.split(r"\n|\. ", str(error))[0][:200]
        raise UserError(f"cannot load {str(name_or_path)!r} ({reason}): pass a name on the Hub "
                        f"such as gpt2, a folder in Hugging Face's format, a run's folder or a "
                        f"model_<step>.pt") from None
    finally:
        logging.disable(logging.NOTSET)
    return model, folder


def download_snapshot(name: str) -> Path:
    """Download a model from the Hub, unless it is cached, and return its folder."""
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "tokenizer.tiktoken", "model*.safetensors"]
    folder = Path(snapshot_download(name, allow_patterns=patterns))
    if not list(folder.glob("*.safetensors")):
        snapshot_download(name, allow_patterns="pytorch_model*.bin")  # into the same folder
    return folder


def find_tokenizer(folder: Path, vocab_size: int) -> str | None:
    """Return the merge table of the folder's tokenizer; without one, "gpt2" if vocab_size matches;
    None if unknown."""
    if (folder / "tokenizer.tiktoken").is_file():
        return Tokenizer.load(folder).merge_table
    gpt2 = Tokenizer()
    if not (folder / "vocab.json").is_file() and not (folder / "tokenizer.json").is_file():
        return "gpt2" if vocab_size == gpt2.n_vocab else None
    from transformers import GPT2Tokenizer

    vocab = GPT2Tokenizer.from_pretrained(folder).get_vocab()
    # There may be more: padding tokens.
    return "gpt2" if gpt2.vocab().items() <= vocab.items() else None


def save_pretrained(checkpoint: dict, folder: Path) -> None:
    """Write the model (float32) and the tokenizer of a checkpoint to `folder`. The weights are
    taken out of `checkpoint["model"]`, so that memory holds them only once.

    Raises OSError or a library's error if the disk is full.
    """
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer
    from transformers.utils.logging import disable_progress_bar

    config, weights = checkpoint["config"], checkpoint["model"]
    tokenizer = Tokenizer(checkpoint["tokenizer"]) if checkpoint["tokenizer"] else None
    end_of_text = tokenizer.end_of_text if tokenizer else None
    settings = {name: config[name] for name in SIZES}
    settings |= dict.fromkeys(("n_positions", "n_ctx"), config["block_size"])  # llama.cpp: n_ctx
    settings |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config["dropout"])
    settings |= dict.fromkeys(("bos_token_id", "eos_token_id"), end_of_text)
    with torch.device("meta"):
        hf_model = GPT2LMHeadModel(GPT2Config(**settings))
    weights = {name: weights.pop(name) for name in list(weights)}
    transpose(weights)
    hf_model.transformer.load_state_dict(weights, assign=True)
    hf_model.tie_weights()
    disable_progress_bar()
    hf_model.save_pretrained(folder)
    if tokenizer:
        # arg-type: outdated hints.
        GPT2Tokenizer(tokenizer.vocab(), tokenizer.merges(),  # type: ignore[arg-type]
                      model_max_length=config["block_size"]).save_pretrained(folder)
        tokenizer.save(folder)
