"""The log of a run: one JSON object per line and step, and TensorBoard where it is installed."""

import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class RunLog:
    """Appends records to `folder/log.jsonl`, and their numbers to `folder/tensorboard` if it can be imported.

    Every record reaches the file as a whole line at once, so a run that is killed leaves at most one partial line,
    which the next resume drops together with everything after the checkpoint.

    Args:
        folder: of the run.
        step: keep the records up to this step (resume), drop the others; None starts anew.

    Raises:
        FileNotFoundError: no log to resume.
        ValueError: the log to resume is damaged before `step`; it is left as it is.
    """

    def __init__(self, folder: Path, step: int | None = None):
        self.path = folder / "log.jsonl"
        self.records: list[Record] = []  # those kept
        if step is None:
            self.path.write_bytes(b"")
        else:
            self.records, size = _read(self.path, step)
            if not self.records or self.records[-1]["step"] != step:
                raise ValueError(
                    f"{self.path} is damaged in line {len(self.records) + 1}, before step {step} to resume"
                )
            os.truncate(self.path, size)
        self._board = _tensorboard_writer(folder / "tensorboard", step)

    def write(self, record: Record) -> None:
        """Append one record."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._board is not None:
            for name, value in record.items():
                if isinstance(value, int | float) and name != "step":
                    self._board.add_scalar(name, value, record["step"])

    def sync(self) -> None:
        """Have all records reach the disk, before the checkpoint that counts on them does."""
        with self.path.open("a") as file:
            os.fsync(file.fileno())

    def close(self) -> None:
        """Close TensorBoard's file; nothing else is kept open."""
        if self._board is not None:
            self._board.close()


def read_log(path: str | os.PathLike) -> list[Record]:
    """The whole records of a log.jsonl, in order.

    Raises:
        FileNotFoundError: no log at `path`.
    """
    return _read(Path(path), None)[0]


def _read(path: Path, last_step: int | None) -> tuple[list[Record], int]:
    """Records up to `last_step` (None: all), and the bytes that they take; a damaged line ends the log."""
    records, size = [], 0
    if not path.exists():
        raise FileNotFoundError(f"no log at {path}")
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                break
            step = record.get("step") if isinstance(record, dict) else None
            if not isinstance(step, int) or not line.endswith(b"\n"):
                break
            if last_step is not None and step > last_step:
                break
            records.append(record)
            size += len(line)
    return records, size


def _tensorboard_writer(folder: Path, step: int | None):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder, purge_step=None if step is None else step + 1)
