"""Write a trained model as a folder that Hugging Face's tools load: python -m scripts.export --out my_gpt2"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import yaml

from gpt import pretrained
from gpt.errors import UserError
from gpt.files import read_metrics
from gpt.shards import read_meta
from scripts import cli


@dataclass
class ExportConfig(cli.CheckpointConfig):
    """Settings of scripts.export."""

    out: str  # output folder, new or empty


def main(config: ExportConfig) -> None:
    """Write config.json, generation_config.json, model.safetensors, the tokenizer and a model card: all or nothing."""
    out = Path(config.out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out {config.out!r} is there already and is not empty: pass another folder, or delete it")
    source, checkpoint = cli.find_checkpoint(config)
    card = model_card(Path(source), checkpoint)
    aside = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)  # of an export that was killed
    try:
        aside.mkdir(parents=True)
        pretrained.save(checkpoint, aside)
        (aside / "README.md").write_text(card, encoding="utf-8")
        os.replace(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    if not checkpoint.get("tokenizer"):
        print("it was trained on token ids of no known tokenizer: the folder has no tokenizer either")
    print(f"wrote {config.out}: transformers.AutoModelForCausalLM.from_pretrained({config.out!r}) loads it")


def model_card(source: Path, checkpoint: dict) -> str:
    """What is known of a checkpoint, as the README.md of its folder: data, tokens, losses and the run's settings."""
    shape, step, settings = checkpoint["config"], checkpoint["step"], checkpoint.get("train_config") or {}
    parameters = sum(tensor.numel() for tensor in checkpoint["model"].values())
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "---", "",
             f"# {source.stem if source.suffix == '.pt' else source.name}", "",
             f"A GPT-2 of {parameters:,} parameters: {shape['n_layer']} layers, {shape['n_head']} heads, width "
             f"{shape['n_embd']}, context {shape['block_size']} tokens, vocabulary {shape['vocab_size']:,}.", ""]
    if {"data_root", "total_batch_size", "init_from"} <= settings.keys():
        try:
            data = read_meta(settings["data_root"]).get("source")
        except (UserError, OSError):  # the data may be gone by now
            data = None
        lines += [f"Trained on `{settings['data_root']}`{f' ({data})' if data else ''} for {step:,} steps of "
                  f"{settings['total_batch_size']:,} tokens, {step * settings['total_batch_size']:,} in all, starting "
                  f"from {settings['init_from']}.", "", "| loss | nats per token |", "|---|---|"]
        records = read_metrics(source.with_name("metrics.jsonl"))  # train's are of the update before, evaluations after
        results = {record["split"]: record for record in records
                   if record["step"] == step - (record["split"] == "train")}
        for split, name in (("train", "training, last step"), ("val", "validation")):
            if split in results:
                lines += [f"| {name} | {results[split]['loss']:.4f} |"]
        if accuracy := results.get("hellaswag"):
            lines += ["", f"HellaSwag, {accuracy['examples']} examples: acc {accuracy['acc']:.4f}, acc_norm "
                          f"{accuracy['acc_norm']:.4f}"]
        lines += ["", "Settings of the run:", "", "```yaml", yaml.safe_dump(settings, sort_keys=False).strip(), "```"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run_cli(main, ExportConfig)
