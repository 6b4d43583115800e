"""What looks wrong in a run, with its cause and what to do about it."""

import math
from statistics import fmean

STEPS = 50  # that a judgement about training looks back


def red_flags(train: list[dict], val: list[dict], vocab_size: int, warmup_steps: int) -> dict[str, str]:
    """Name and words of each problem that a run's records show.

    train, val: the records of each split in metrics.jsonl, in their order. Looks at the newest only: it may be asked at
    every step.
    """
    found = {}
    mean = fmean(record["loss"] for record in train[-STEPS:]) if train else 0.0
    trained = len(train) >= 2 * STEPS and train[-1]["step"] >= warmup_steps
    if trained and vocab_size >= 64 and mean > 0.95 * math.log(vocab_size):  # DNA, say, is near ln(4) by nature
        found["flat"] = (
            f"the loss is still {mean:.2f}, and ln({vocab_size}) = {math.log(vocab_size):.2f} is that of no knowledge. "
            f"It does not learn: raise --max_lr, and see whether --overfit_one_batch true, with another --log_dir, "
            f"brings the loss to 0")
    norms = [norm for record in train[-STEPS:] if (norm := record.get("grad_norm")) is not None]
    if len(norms) == STEPS and min(norms) > 10:
        found["norm"] = (
            f"the gradient norm has been above 10 for {STEPS} steps (now {norms[-1]:.1f}): the steps are too large to "
            f"settle; lower --max_lr or raise --warmup_steps")
    lately = [record["loss"] for record in val[-4:]]
    if len(lately) == 4 and lately == sorted(set(lately)):
        start, a, b = val[-4]["step"], lately[0], lately[-1]
        since = [record["loss"] for record in train[-20 * STEPS:] if record["step"] >= start]
        few = min(STEPS, len(since) // 2)
        if few and fmean(since[-few:]) < fmean(since[:few]):
            found["rising"] = (
                f"the validation loss rose from {a:.4f} to {b:.4f} since step {start}, while training loss fell: the "
                f"model learns its text by heart; use model_best.pt, and for the next run more text, "
                f"--model.dropout 0.2 or --patience 3")
    return found
