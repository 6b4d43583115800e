"""GPT-2 in Hugging Face's format: load it from a folder or from the hub,
and save it to a folder."""

import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from gpt.config import GPTConfig
from gpt.errors import UserError
from gpt.files import atomic_write, load_pt, read_json
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
SOURCE_HINT = ("pass a hub name such as gpt2, a folder in Hugging Face's format, "
               "or a model_<step>.pt")


def load_pretrained(name_or_path: str | Path) -> dict:
    """Return a model as a step-0 checkpoint, float32 on the CPU.

    Raises UserError if it is damaged or unsupported.
    """
    folder = resolve_model_dir(name_or_path)
    config = read_config(folder / "config.json")
    weights: dict[str, torch.Tensor] = {}
    for path in find_weight_files(folder):
        try:
            for name, tensor in read_tensors(path):
                if name.endswith((".attn.bias", ".attn.masked_bias")):
                    continue  # causal masks, stored in older files
                tensor = (tensor.t() if name.endswith(TRANSPOSED) else tensor).contiguous().float()
                # isfinite().all() would allocate a tensor of booleans.
                if not tensor.sum().isfinite():
                    raise ValueError(f"{name} has infinite or NaN values")
                weights[name.removeprefix("transformer.")] = tensor
        except Exception as error:  # a damaged file can raise anything
            # Cuts torch.load's unsafe advice.
            reason = str(error).split("\n")[0].split(". ")[0][:150]
            raise UserError(f"{path} is damaged or not a weight file ({reason}): "
                            f"download or export it again") from None
    lm_head = weights.pop("lm_head.weight", None)
    if lm_head is not None and not torch.equal(lm_head, weights.setdefault("wte.weight", lm_head)):
        raise UserError(f"lm_head.weight in {folder} differs from wte.weight: "
                        f"only tied weights are supported")
    tokenizer = find_tokenizer(folder, config)
    return {"model": weights, "config": asdict(config), "step": 0, "tokenizer": tokenizer}


def resolve_model_dir(name_or_path: str | Path) -> Path:
    """Return the folder of a model; download it if it is a hub name.

    Raises UserError if it holds no model.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        folder = download_snapshot(str(name_or_path))
    if not (folder / "config.json").is_file() or not find_weight_files(folder):
        raise UserError(f"{str(name_or_path)!r} has no config.json or no weight files: "
                        f"{SOURCE_HINT}")
    return folder


def download_snapshot(name: str) -> Path:
    """Download a model from the hub, unless it is cached, and return its folder.

    Raises UserError on failure.
    """
    # Takes 0.3 s, and most runs do not need the hub.
    from huggingface_hub import errors, snapshot_download

    try:
        patterns = ["*.json", "tokenizer.tiktoken", "model*.safetensors"]
        folder = Path(snapshot_download(name, allow_patterns=patterns))
        if not list(folder.glob("*.safetensors")):
            snapshot_download(name, allow_patterns="pytorch_model*.bin")
        return folder
    except errors.RepositoryNotFoundError:
        reason = ("not found, private or gated: check the name, run `hf auth login`, "
                  "accept the model's terms there")
    except errors.LocalEntryNotFoundError:
        reason = "no network, and no copy from an earlier download"
    except Exception as error:  # a server or disk error, or a name with invalid characters
        reason = str(error).strip().split("\n")[0][:150]
    raise UserError(f"cannot load {name!r}: no such folder, and the hub download failed "
                    f"({reason}): {SOURCE_HINT}")


def read_config(path: Path) -> GPTConfig:
    """Return the model config in a config.json.

    Raises UserError with the name of an invalid or unsupported setting.
    """
    settings = read_json(path, "a model config")
    for name, supported in SUPPORTED_VALUES.items():
        if settings.get(name, supported[0]) not in supported:
            raise UserError(f"{path} has {name} {settings[name]!r}, which is not supported: "
                            f"expected {supported[0]!r}")
    names = ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")
    sizes = {name: settings.get(name, "?") for name in names}
    if not all(isinstance(size, int) for size in sizes.values()):
        raise UserError(f"{path} has {sizes}: expected whole numbers")
    return GPTConfig(block_size=sizes.pop("n_positions"), **sizes)


def find_weight_files(folder: Path) -> list[Path]:
    """Return a model's weight files: one or, if there is an index, several;
    [] if there are none."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            weight_map = read_json(index, "an index of shards").get("weight_map")
            if not isinstance(weight_map, dict):
                raise UserError(f"{index} has no weight_map: download or export it again")
            return sorted({folder / str(shard) for shard in weight_map.values()})
    return []


def read_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and tensor of each entry of a weight file, without keeping a reference:
    the caller can free it."""
    if path.suffix == ".safetensors":
        # pread: pages of a mapped file would count as used memory.
        with safe_open(path, "pt", backend="pread") as file:
            for name in file.keys():  # noqa: SIM118, not a dict
                yield name, file.get_tensor(name)
    else:
        # load_pt verifies checksums; files from before PyTorch 1.6
        # are not zip archives and have none.
        if zipfile.is_zipfile(path):
            tensors = load_pt(path)
        else:
            tensors = torch.load(path, "cpu", weights_only=True)
        while tensors:
            yield tensors.popitem()


def find_tokenizer(folder: Path, config: GPTConfig) -> str | None:
    """Return the merge table of the folder's tokenizer; without one, "gpt2" if vocab_size matches;
    None if unknown."""
    if (folder / "tokenizer.tiktoken").is_file():
        return Tokenizer.load(folder).merge_table
    gpt2 = Tokenizer()
    vocab: Any
    if (folder / "vocab.json").is_file():
        vocab = read_json(folder / "vocab.json", "a vocabulary")
    elif (folder / "tokenizer.json").is_file():
        model = read_json(folder / "tokenizer.json", "a tokenizer").get("model")
        vocab = model.get("vocab") if isinstance(model, dict) else None
    else:
        return "gpt2" if config.vocab_size == gpt2.n_vocab else None
    # There may be more: padding tokens.
    is_gpt2 = isinstance(vocab, dict) and gpt2.vocab().items() <= vocab.items()
    return "gpt2" if is_gpt2 else None


def save_pretrained(checkpoint: dict, folder: Path) -> None:
    """Write the model (float32) and the tokenizer of a checkpoint to `folder`.

    Raises OSError if the disk is full.
    """
    config = checkpoint["config"]
    tokenizer = Tokenizer(checkpoint["tokenizer"]) if checkpoint.get("tokenizer") else None
    end_of_text = tokenizer.end_of_text if tokenizer else None
    special_token_ids = dict.fromkeys(("bos_token_id", "eos_token_id"), end_of_text)
    settings = {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "dtype": "float32",
        "n_positions": config["block_size"],
        "n_ctx": config["block_size"],  # llama.cpp reads n_ctx, the older name
        **{name: config[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")},
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config["dropout"]),
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
        **special_token_ids}
    for file_name, content in (("config.json", settings),
                               ("generation_config.json", special_token_ids)):
        (folder / file_name).write_text(json.dumps(content, indent=2) + "\n")
    write_safetensors(folder / "model.safetensors", {
        f"transformer.{name}": tensor.t() if name.endswith(TRANSPOSED) else tensor
        for name, tensor in checkpoint["model"].items()})
    if tokenizer:
        from transformers import GPT2Tokenizer  # takes seconds

        try:
            # arg-type: outdated hints.
            GPT2Tokenizer(tokenizer.vocab(), tokenizer.merges(),  # type: ignore[arg-type]
                          model_max_length=config["block_size"]).save_pretrained(folder)
        except Exception as error:  # a Rust library, which reports an OSError as text
            if not (number := re.search(r"os error (\d+)", str(error))):
                raise
            raise OSError(int(number[1]), str(error), str(folder)) from None
        tokenizer.save(folder)


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write float32 tensors one by one: safetensors' own `save_file` would need contiguous
    copies of all of them.

    The format is the header's length in 8 bytes, the header in JSON, the data.
    Raises OSError if the disk is full."""
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [begin, end]}
    header_bytes = json.dumps(header).encode()
    header_bytes += b" " * (-len(header_bytes) % 8)  # aligns the data
    with atomic_write(path) as file:
        file.write(len(header_bytes).to_bytes(8, "little") + header_bytes)
        for tensor in tensors.values():
            file.write(tensor.contiguous().numpy().data)
