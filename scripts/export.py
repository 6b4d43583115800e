"""Export a trained model in Hugging Face format: python -m scripts.export --out my_gpt2"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import yaml

from gpt.checkpoint import CheckpointConfig, find_checkpoint
from gpt.errors import UserError
from gpt.files import read_metrics
from gpt.pretrained import save_pretrained
from scripts import cli


@dataclass
class ExportConfig(CheckpointConfig):
    """Settings of scripts.export."""

    out: str  # output folder, new or empty


def main(config: ExportConfig) -> None:
    """Write config.json, generation_config.json, model.safetensors, the tokenizer and a model card:
    all or nothing."""
    out = Path(config.out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {config.out} exists and is not empty: "
                        f"choose another folder or delete it")
    source, checkpoint = find_checkpoint(config)
    card = model_card(Path(source), checkpoint)
    tmp_dir = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(tmp_dir, ignore_errors=True)  # left by an export that was killed
    try:
        tmp_dir.mkdir(parents=True)
        save_pretrained(checkpoint, tmp_dir)
        (tmp_dir / "README.md").write_text(card, encoding="utf-8", errors="replace")
        os.replace(tmp_dir, out)
    except Exception as error:  # the disk, in the words of safetensors or tokenizers
        raise UserError(f"cannot write --out {config.out} ({error})") from None
    finally:
        shutil.rmtree(tmp_dir, ignore_errors=True)
    if not checkpoint.get("tokenizer"):
        print("no tokenizer exported: the model was trained on raw token ids")
    print(f"wrote {config.out}: load it with "
          f"transformers.AutoModelForCausalLM.from_pretrained({config.out!r})")


def model_card(source: Path, checkpoint: dict) -> str:
    """Return a README.md for the checkpoint loaded from `source`:
    data, tokens, val loss and settings of its run."""
    model, step = checkpoint["config"], checkpoint["step"]
    n_params = sum(tensor.numel() for tensor in checkpoint["model"].values())
    paragraphs = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---", f"# {source.stem}",
        f"A GPT-2 with {n_params:,} parameters: {model['n_layer']} layers, "
        f"{model['n_head']} heads, n_embd {model['n_embd']}, "
        f"context {model['block_size']} tokens, vocabulary {model['vocab_size']:,}."]
    if settings := checkpoint.get("train_config"):
        tokens = step * settings["total_batch_size"]
        paragraphs.append(f"Trained on `{settings['data_root']}` for {step:,} steps "
                          f"({tokens:,} tokens), starting from {settings['init_from']}.")
        for record in read_metrics(source.with_name("metrics.jsonl")):
            if record["split"] == "val" and record["step"] == step:
                paragraphs.append(f"Validation loss: {record['loss']:.4f} nats per token.")
        listing = yaml.safe_dump(settings, sort_keys=False).strip()
        paragraphs.append(f"Settings:\n\n```yaml\n{listing}\n```")
    return "\n\n".join(paragraphs) + "\n"


if __name__ == "__main__":
    cli.run_cli(main, ExportConfig)
