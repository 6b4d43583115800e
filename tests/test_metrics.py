"""gpt/metrics.py: a line for every step, whatever happens to the file."""

import json

from gpt.metrics import RunLog, read_metrics


def step(log, number):
    log.step(step=number, loss=1.5, lr=0.1, grad_norm=2.0, seconds=0.5, mfu=0.5, batch_tokens=64, epoch=0.5,
             line=False)


def test_lines_survive_a_folder_that_cannot_be_written(tmp_path, capsys):
    """Steps of the time in which the file could not be written come later, once and in order."""
    log = RunLog(tmp_path, enabled=True)
    log.start(0, {"max_steps": 10})
    step(log, 0)
    log.path.rename(tmp_path / "aside")
    log.path.mkdir()
    for number in (1, 2, 3):
        step(log, number)
    log.path.rmdir()
    (tmp_path / "aside").rename(log.path)
    with open(log.path, "a") as file:
        file.write('{"step": 1, "spl')  # as much of a line as a full disk took
    step(log, 4)
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [0, 1, 2, 3, 4]
    assert capsys.readouterr().out.count("warning: ") == 1
    assert [record["step"] for record in read_metrics(log.path)] == [0, 1, 2, 3, 4]


def test_a_deleted_file_begins_again(tmp_path):
    """With the next line, not with as many zeros as there were letters."""
    log = RunLog(tmp_path, enabled=True)
    log.start(0, {"max_steps": 10})
    step(log, 0)
    log.path.unlink()
    step(log, 1)
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1]


def test_what_came_after_the_checkpoint_is_dropped(tmp_path):
    """A run that goes on at step 2 logs it again; the lowest validation loss is that of the part that stays."""
    log = RunLog(tmp_path, enabled=True)
    assert log.start(0, {"max_steps": 10}) == (float("inf"), 0)
    for number in range(4):
        step(log, number)
        log.validation(step=number + 1, loss=5.0 - number, bits_per_byte=None)
    again = RunLog(tmp_path, enabled=True)
    assert again.start(2, {"max_steps": 10}) == (4.0, 0)
    kept = [(record["step"], record["split"]) for record in read_metrics(again.path)]
    assert kept == [(0, "train"), (1, "val"), (1, "train"), (2, "val")]
