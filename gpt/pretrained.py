"""GPT-2 in Hugging Face's format: weights in, from the hub or a folder, and out, for every tool that loads a GPT-2.

A folder holds `config.json`, the weights and the tokenizer. Its names are ours behind `transformer.`; the four matrices
of a block come from a layer called Conv1D and are stored (in, out): they are transposed here and nowhere else.
"""

import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gpt.config import GPTConfig
from gpt.errors import UserError
from gpt.files import load_pt, read_json
from gpt.tokenizer import Tokenizer

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

# What transformers also calls the parts of a model's shape.
OTHER_NAMES = {"block_size": ("n_positions", "max_position_embeddings"), "n_layer": ("num_hidden_layers",),
               "n_head": ("num_attention_heads",), "n_embd": ("hidden_size",)}
# What a config.json may say about things that gpt/model.py computes in one way only. Left out means the first.
COMPUTED_HERE = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),  # three names of GELU's tanh form
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "is_causal": (True,),
    "tie_word_embeddings": (True,),
    "quantization_config": (None,),
}
CAUSAL_MASK = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # entries of older files with nothing to learn in them

INSTEAD = ("pass a name on the hub like gpt2, a folder that transformers or scripts.export wrote, or the path of a "
           "model_<step>.pt")


def load(name_or_path: str | Path) -> dict:
    """The weights and the shape of a GPT-2 as a checkpoint of step 0, float32 on the CPU; each tensor is read once.

    `tokenizer` is "gpt2" if the folder's is GPT-2's, or if it has none and the size of the vocabulary is GPT-2's.
    Raises UserError where the weights cannot be had, are damaged, or belong to a model that computes something else.
    """
    folder = find_folder(name_or_path)
    config = read_config(folder / "config.json")
    weights = {}
    for name, tensor in read_tensors(folder):
        try:
            name = name.removeprefix("transformer.")
            if CAUSAL_MASK.fullmatch(name):
                continue
            if name in weights:
                raise ValueError("it is there twice")
            if not tensor.is_floating_point():
                raise ValueError(f"it is {tensor.dtype}, of a quantized model?")
            if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
                raise ValueError("it is larger than its data")
            tensor = (tensor.t() if name.endswith(TRANSPOSED) else tensor).float().contiguous()
            if not tensor.sum().isfinite():
                raise ValueError("it holds infinities, or what is not a number")
            weights[name] = tensor
        except Exception as error:  # a name or a tensor of any kind
            raise UserError(f"{name} in {folder} is not a weight of a GPT-2 ({error})") from None
    if not torch.equal(weights.pop("lm_head.weight", wte := weights.get("wte.weight", torch.empty(0))), wte):
        raise UserError(f"lm_head.weight in {folder} is not wte.weight: this GPT-2 has one matrix for both")
    return {"model": weights, "config": asdict(config), "step": 0, "tokenizer": find_tokenizer(folder, config)}


def find_folder(name_or_path: str | Path) -> Path:
    """The folder that holds a model: `name_or_path` itself, or where the hub's files are kept on this machine.

    Raises UserError for a folder without config.json and for a name that the hub does not hand out.
    """
    folder = Path(name_or_path) if Path(name_or_path).is_dir() else download(str(name_or_path))
    if not (folder / "config.json").is_file():
        raise UserError(f"{str(name_or_path)!r} has no config.json: {INSTEAD}")
    return folder


def download(name: str) -> Path:
    """The folder with the files of a model on the hub. Raises UserError where they cannot be had."""
    from huggingface_hub import errors, snapshot_download  # 0.3 s, and most runs need no hub

    try:
        files = ["config.json", "vocab.json", "tokenizer.json"]
        folder = Path(snapshot_download(name, allow_patterns=[*files, "model*.safetensors*"]))
        if not weight_files(folder):
            folder = Path(snapshot_download(name, allow_patterns=[*files, "pytorch_model*.bin*"]))
        return folder
    except Exception as error:  # of the network, the hub, the disk, or a name that cannot be one
        known = {errors.GatedRepoError: "its terms must be accepted there first, then run `hf auth login`",
                 errors.RepositoryNotFoundError: "it is not there, or it is private: then run `hf auth login`",
                 errors.LocalEntryNotFoundError: "no connection to it, and no copy from earlier"}
        reason = next((words for kind, words in known.items() if isinstance(error, kind)),
                      str(error).strip().split("\n")[0][:200])
        raise UserError(f"{name!r} is not a folder here, and cannot be had from the Hugging Face hub ({reason}): "
                        f"{INSTEAD}") from None


def read_config(path: Path) -> GPTConfig:
    """The shape that a config.json describes. Raises UserError, by name, for what gpt/model.py does not compute."""
    settings = read_json(path, "a model's configuration")
    shape = {"block_size": 1024, "vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768}
    for name in shape:
        for theirs in (name, *OTHER_NAMES.get(name, ())):
            shape[name] = settings.get(theirs, shape[name])
    for name, value in shape.items():
        if type(value) is not int or value < 1:
            raise UserError(f"{path} has {name} {value!r}: expected a whole number above 0")
    for name, accepted in {**COMPUTED_HERE, "n_inner": (None, 4 * shape["n_embd"])}.items():
        if settings.get(name, accepted[0]) not in accepted:
            raise UserError(f"{path} has {name} {settings[name]!r}: this GPT-2 computes {accepted[0]!r} only")
    return GPTConfig(**shape)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights: safetensors before pickles, in one file or, with an index, in several.

    Raises UserError for an index that is not one or names files that are not there.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                names = sorted(set(read_json(index, "an index of weight files")["weight_map"].values()))
                missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
            except (OSError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{index} is not an index of weight files ({error!r})") from None
            if missing:
                raise UserError(f"{index} names {missing[0]!r}, which is not in that folder")
            return [folder / name for name in names]
    return []


def read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every (name, tensor) of a folder, one at a time. Raises UserError for damaged files, and where there are none."""
    files = weight_files(folder)
    if not files:
        raise UserError(f"{str(folder)!r} has no model.safetensors and no pytorch_model.bin: {INSTEAD}")
    for path in files:
        try:
            if path.suffix == ".safetensors":
                # Not mapped into memory, where the pages of what is transposed would be counted twice.
                with safe_open(path, "pt", backend="pread") as file:
                    for name in file.keys():  # noqa: SIM118, it is no dictionary
                        yield name, file.get_tensor(name)
            else:
                # OpenAI's own sizes were saved before torch.save wrote zip archives, and have no checksums.
                tensors = (load_pt(path) if zipfile.is_zipfile(path)
                           else torch.load(path, map_location="cpu", weights_only=True))
                while tensors:
                    yield tensors.popitem()
        except UserError:
            raise
        except Exception as error:  # what a hostile or truncated file raises is not to be foreseen
            reason = re.split(r"\. |\n", str(error))[0][:150]
            raise UserError(f"{path} is damaged or not a weight file ({reason})") from None


def find_tokenizer(folder: Path, config: GPTConfig) -> str | None:
    """The tokenizer of a model's folder, as `gpt.tokenizer` names it: "gpt2", or one of ours; None for another."""
    path = next((folder / name for name in ("vocab.json", "tokenizer.json") if (folder / name).is_file()), None)
    if path is None:
        return "gpt2" if config.vocab_size == Tokenizer().n_vocab else None
    theirs: Any = read_json(path, "a tokenizer's vocabulary")
    if path.name == "tokenizer.json":
        theirs = theirs["model"].get("vocab") if isinstance(theirs.get("model"), dict) else None
    own = [Tokenizer.load(folder)] if (folder / "tokenizer.tiktoken").is_file() else []  # beside what other tools read
    return next((known.merge_table for known in (Tokenizer(), *own) if isinstance(theirs, dict)
                 and known.vocab().items() <= theirs.items()), None)


def save(checkpoint: dict, folder: Path) -> None:
    """Write the model of a checkpoint into `folder`, in float32: its weights are taken out of `checkpoint` on the way.

    Raises OSError, of a full disk for one.
    """
    config, weights = checkpoint["config"], checkpoint["model"]
    tokenizer = Tokenizer(checkpoint["tokenizer"]) if checkpoint.get("tokenizer") else None
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.end_of_text if tokenizer else None)
    settings = {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "dtype": "float32",
        "n_positions": config["block_size"], "n_ctx": config["block_size"],  # the older name, which llama.cpp reads
        **{name: config[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")},
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config["dropout"]),
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
        **ends}
    for name, content in (("config.json", settings), ("generation_config.json", ends)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    theirs = {}
    while weights:
        name, tensor = weights.popitem()
        theirs[f"transformer.{name}"] = (tensor.t() if name.endswith(TRANSPOSED) else tensor).contiguous()
    try:
        if tokenizer:
            from transformers import GPT2Tokenizer  # seconds

            GPT2Tokenizer(tokenizer.vocab(), tokenizer.merges(),  # type: ignore[arg-type]  # its hints lag
                          model_max_length=config["block_size"]).save_pretrained(folder)
            tokenizer.save(folder)
        save_file(theirs, folder / "model.safetensors", metadata={"format": "pt"})
    except Exception as error:  # two Rust libraries, which put an OSError into words
        if not (number := re.search(r"os error (\d+)", str(error))):
            raise
        raise OSError(int(number[1]), str(error), str(folder)) from None
    # It is made for this user's eyes only.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
