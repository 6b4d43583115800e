"""TensorBoard and Weights & Biases, for those who ask for them: a run's numbers, texts and settings."""

import html
import importlib
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from gpt.atomic import atomic_write
from gpt.errors import UserError


class Dashboards:
    """Sends to those that are asked for. One that fails, on a full disk say, gets nothing more, with a warning: the run
    goes on without it.

    Raises UserError where one is not installed, or Weights & Biases does not take the run.
    """

    def __init__(self, folder: Path, tensorboard: bool, wandb_project: str | None, warn: Callable[[str], None]):
        self.folder, self.wandb_project, self.warn = folder, wandb_project, warn
        self.tensorboard = optional("torch.utils.tensorboard", "tensorboard") if tensorboard else None
        self.wandb: Any = optional("wandb", "wandb") if wandb_project else None
        self.writers: dict[str, Any] = {}

    def start(self, step: int, purge_step: int, settings: dict) -> None:
        """Begin at `step`, or go on there; what TensorBoard has of `purge_step` and later comes again."""
        if self.tensorboard:
            self.writers["tensorboard"] = self.tensorboard.SummaryWriter(self.folder, purge_step=purge_step)
        if self.wandb:
            name = self.folder / "wandb_run.txt"  # a run that goes on is the same run there
            if step == 0 or not name.exists():
                with atomic_write(name) as file:
                    file.write(uuid.uuid4().hex.encode())
            try:
                self.writers["wandb"] = self.wandb.init(
                    project=self.wandb_project, name=self.folder.name, dir=self.folder, id=name.read_text(),
                    resume="allow", config=settings)
            except self.wandb.Error as error:
                raise UserError(f"wandb_project {self.wandb_project!r}: {error}") from None
        text = f"```\n{yaml.safe_dump(settings, sort_keys=False)}```"
        self._send(lambda board: board.add_text("settings", text, step), lambda run: None)

    def scalars(self, record: dict) -> None:
        """The numbers of a record of metrics.jsonl, as train/loss and so on."""
        step, split = record["step"], record["split"]
        values = {f"{split}/{name}": value for name, value in record.items()
                  if name not in ("step", "split") and value is not None}
        self._send(lambda board: [board.add_scalar(name, value, step) for name, value in values.items()],
                   lambda run: run.log(values, step=step))

    def text(self, name: str, text: str, step: int) -> None:
        """A text, shown as it is."""
        self._send(lambda board: board.add_text(name, f"```\n{text}\n```", step),
                   lambda run: run.log({name: self.wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step=step))

    def close(self) -> None:
        """Write what is left."""
        self._send(lambda board: board.close(), lambda run: run.finish())
        self.writers = {}

    def _send(self, tensorboard: Callable[[Any], Any], wandb: Callable[[Any], Any]) -> None:
        for name, send in (("tensorboard", tensorboard), ("wandb", wandb)):
            if name in self.writers:
                try:
                    send(self.writers[name])
                except Exception as error:  # whatever goes wrong in there
                    del self.writers[name]
                    self.warn(f"warning: {name} has failed and gets no more of this run ({error})")


def optional(module: str, package: str) -> Any:
    """A module of a package that need not be there. Raises UserError if it is not."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{package} is not installed ({error}): pip install {package}") from None
