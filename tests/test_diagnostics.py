"""gpt/diagnostics.py: a warning for each problem, and none for a healthy run."""

import math

from gpt.diagnostics import diagnose


def train_records(losses, norm=1.0):
    return [{"step": step, "loss": loss, "grad_norm": norm} for step, loss in enumerate(losses)]


def val_records(losses):
    return [{"step": 50 * i, "loss": loss} for i, loss in enumerate(losses, 1)]


def test_diagnose_returns_nothing_for_healthy_run():
    """Falling losses, a noisy val loss, a first norm above 10."""
    train = train_records([10.8 - 6 * (1 - math.exp(-step / 80)) for step in range(400)])
    train[0]["grad_norm"] = 30.0
    val = val_records([8.0, 7.0, 6.5, 6.2, 6.25, 6.1, 6.15, 6.2])
    for step in range(400):
        assert diagnose(train[:step + 1], val[:step // 50], 50257, warmup_steps=100) == {}, step


def test_diagnose_warns_of_flat_loss():
    """Near ln(vocab_size) after 100 steps, but not before the warmup is over."""
    train = train_records([math.log(2048) - 0.05] * 150)
    message = diagnose(train[:100], [], 2048, warmup_steps=30)["flat"]
    assert "7.57" in message and "ln(2048) = 7.62" in message and "--max_lr" in message
    assert diagnose(train[:99], [], 2048, warmup_steps=30) == {}
    assert diagnose(train, [], 2048, warmup_steps=200) == {}
    # data such as DNA stays near ln(4)
    assert diagnose(train_records([math.log(4) - 0.01] * 150), [], 4, 0) == {}


def test_diagnose_warns_of_high_gradient_norm():
    """Above 10 for 50 steps in a row; a step that fp16 skipped has no norm and breaks the row."""
    train = train_records([5.0] * 60, norm=12.0)
    assert "12.0" in diagnose(train, [], 50257, 0)["norm"]
    for norm in (9.0, None):
        train[-7]["grad_norm"] = norm
        assert diagnose(train, [], 50257, 0) == {}


def test_diagnose_warns_of_overfitting():
    """The val loss rises three times in a row, and only if the training loss falls meanwhile."""
    falling, rising = (train_records([6 + sign * step / 100 for step in range(250)])
                       for sign in (-1, 1))
    val = val_records([4.0, 3.5, 3.6, 3.7, 3.8])
    message = diagnose(falling, val, 50257, 0)["overfitting"]
    assert "from 3.5000 to 3.8000 since step 100" in message and "model_best.pt" in message
    assert diagnose(falling[:200], val[:4], 50257, 0) == diagnose(rising, val, 50257, 0) == {}
