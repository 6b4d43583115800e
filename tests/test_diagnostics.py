"""gpt/diagnostics.py: a warning for each problem, and none for a healthy run."""

import math

from gpt.diagnostics import diagnose

UNIFORM = math.log(50257)  # the loss of uniform predictions
FALLING = [6 - step / 100 for step in range(250)]


def issues(losses, val=(), norms=400 * (1.0,), warmup_steps=0):
    """Return the names of the problems of a run with these losses and gradient norms in each step
    and a validation every 50 steps."""
    train_records = [{"step": step, "loss": loss, "grad_norm": norm}
                     for step, (loss, norm) in enumerate(zip(losses, norms, strict=False))]
    val_records = [{"step": 50 * i, "loss": loss} for i, loss in enumerate(val, 1)]
    return set(diagnose(train_records, val_records, 50257, warmup_steps))


def test_healthy_run_gets_no_warning():
    """Falling losses, a noisy val loss."""
    losses = [10.8 - 6 * (1 - math.exp(-step / 80)) for step in range(400)]
    val = [8.0, 7.0, 6.5, 6.2, 6.25, 6.1, 6.15, 6.2]
    for step in range(400):
        assert not issues(losses[:step + 1], val[:step // 50]), step


def test_flat_loss_is_near_that_of_uniform_predictions_after_100_steps_and_the_warmup():
    losses = 100 * [UNIFORM - 0.05]
    assert issues(losses, warmup_steps=30) == {"flat"}
    assert not issues(losses, warmup_steps=200)
    assert not issues(losses[1:])


def test_high_gradient_norm_is_above_10_for_50_steps_in_a_row():
    """A step that fp16 skipped has no norm and breaks the row."""
    assert issues(FALLING[:60], norms=60 * [12.0]) == {"norm"}
    for norm in (9.0, None):
        assert not issues(FALLING[:60], norms=[*53 * [12.0], norm, *6 * [12.0]])


def test_overfitting_is_a_val_loss_that_rises_three_times_while_the_training_loss_falls():
    val = [4.0, 3.5, 3.6, 3.7, 3.8]
    assert issues(FALLING, val) == {"overfitting"}
    assert not issues(FALLING[:200], val[:4])
