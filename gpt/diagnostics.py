"""Training diagnostics: detect common problems of a run and suggest a fix."""

import math
from statistics import fmean

LOOKBACK_STEPS = 50


def diagnose(train: list[dict], val: list[dict], vocab_size: int,
             warmup_steps: int) -> dict[str, str]:
    """Return the message of each problem in a run's records, by the problem's name.

    train, val: the split's records in metrics.jsonl, in order.
    Reads only the newest: cheap enough for every step.
    """
    issues = {}
    mean = fmean(record["loss"] for record in train[-LOOKBACK_STEPS:]) if train else 0.0
    past_warmup = len(train) >= 2 * LOOKBACK_STEPS and train[-1]["step"] >= warmup_steps
    # vocab_size >= 64: DNA, for one, stays near ln(4).
    if past_warmup and vocab_size >= 64 and mean > 0.95 * math.log(vocab_size):
        issues["flat"] = (
            f"loss {mean:.2f} is still near ln({vocab_size}) = {math.log(vocab_size):.2f} "
            f"(uniform predictions): raise --max_lr; sanity check: --overfit_one_batch true "
            f"with another --log_dir must reach loss 0")
    recent_norms = [record.get("grad_norm") for record in train[-LOOKBACK_STEPS:]]
    norms = [norm for norm in recent_norms if norm is not None]
    if len(norms) == LOOKBACK_STEPS and min(norms) > 10:
        issues["norm"] = (
            f"gradient norm above 10 for {LOOKBACK_STEPS} steps (now {norms[-1]:.1f}): "
            f"the steps are too large; lower --max_lr or raise --warmup_steps")
    recent_losses = [record["loss"] for record in val[-4:]]
    if len(recent_losses) == 4 and recent_losses == sorted(set(recent_losses)):
        start = val[-4]["step"]
        since = [record["loss"] for record in train[-20 * LOOKBACK_STEPS:]
                 if record["step"] >= start]
        n = min(LOOKBACK_STEPS, len(since) // 2)
        if n and fmean(since[-n:]) < fmean(since[:n]):
            issues["overfitting"] = (
                f"overfitting: val loss rose from {recent_losses[0]:.4f} to "
                f"{recent_losses[-1]:.4f} since step {start} while training loss fell: "
                f"use model_best.pt; next run: more data, --model.dropout 0.2 or --patience 3")
    return issues
