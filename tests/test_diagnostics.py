"""gpt/diagnostics.py: a warning for each thing that goes wrong, and none for a run that goes well."""

import math

from gpt.diagnostics import diagnose


def records(losses, norm=1.0):
    return [{"step": step, "split": "train", "loss": loss, "grad_norm": norm} for step, loss in enumerate(losses)]


def validations(losses, every=50):
    return [{"step": every * (i + 1), "split": "val", "loss": loss} for i, loss in enumerate(losses)]


def test_a_good_run_has_none():
    """Falling losses, a validation loss that wavers, a first norm above 10."""
    train = records([10.8 - 6 * (1 - math.exp(-step / 80)) for step in range(400)])
    train[0]["grad_norm"] = 30.0
    val = validations([8.0, 7.0, 6.5, 6.2, 6.25, 6.1, 6.15, 6.2])
    for step in range(400):
        assert diagnose(train[:step + 1], val[:step // 50], 50257, warmup_steps=100) == {}, step


def test_a_loss_that_stays_flat():
    """Near ln(vocab_size) after 100 steps, but not before the warmup is over."""
    train = records([math.log(2048) - 0.05] * 150)
    assert diagnose(train[:99], [], 2048, warmup_steps=30) == {}
    assert diagnose(train, [], 2048, warmup_steps=200) == {}
    assert diagnose(records([math.log(4) - 0.01] * 150), [], 4, 0) == {}  # DNA, say, is near ln(4) by nature
    words = diagnose(train[:100], [], 2048, warmup_steps=30)["flat"]
    assert "7.57" in words and "ln(2048) = 7.62" in words and "--max_lr" in words and "--overfit_one_batch" in words


def test_a_gradient_norm_that_stays_high():
    """Above 10 for 50 steps; steps that fp16 skipped have none and count neither way."""
    train = records([5.0] * 60, norm=12.0)
    assert "12.0" in diagnose(train, [], 50257, 0)["norm"]
    train[-7]["grad_norm"] = 9.0
    assert diagnose(train, [], 50257, 0) == {}
    train[-7]["grad_norm"] = None
    assert diagnose(train, [], 50257, 0) == {}


def test_validation_that_rises_while_training_falls():
    """Three times in a row; not if training does not fall either."""
    falling, val = records([6 - step / 100 for step in range(400)]), validations([4.0, 3.5, 3.6, 3.7, 3.8, 3.9])
    words = diagnose(falling[:250], val[:5], 50257, 0)["overfitting"]
    assert "from 3.5000 to 3.8000 since step 100" in words and "model_best.pt" in words
    assert diagnose(falling[:200], val[:4], 50257, 0) == {}
    assert diagnose(records([6 + step / 100 for step in range(250)]), val[:5], 50257, 0) == {}
