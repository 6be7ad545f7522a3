"""The folder of one task's predictions while they are made: nothing is lost to a killed run, and nothing is doubled.

    <out>/<model>/<Dataset>/run.json               what the predictions depend on, versions, and notes on prompts
    <out>/<model>/<Dataset>/progress.<rank>.jsonl  one line for each finished batch, appended by one process
    <out>/<model>/<Dataset>/pred.json              all predictions, moved into place when the last batch is done

A batch is the unit: it is always made of the same samples, so that neither a restart nor the number of processes
changes what is padded with what. A line that a kill has torn is not JSON, and its batch is made again.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.milebench.predictions import Record, predictions_json
from eval.milebench.tasks import Sample, read_json

PREDICTIONS, RUN = "pred.json", "run.json"

Done = dict[int, dict[str, Any]]  # {index of a batch: its line}


@dataclass(frozen=True)
class TaskRun:
    """One task under one policy. settings: all that the predictions depend on; about: what else is worth recording."""

    folder: Path
    settings: Mapping[str, Any]
    about: Mapping[str, Any]

    def check(self) -> bool:
        """Whether the task is finished. Raises `ValueError` for a folder that holds predictions made in another way."""
        found = self.folder / RUN
        if not found.is_file():
            if (self.folder / PREDICTIONS).exists():
                raise ValueError(
                    f"{self.folder / PREDICTIONS}: is not from here (there is no {RUN}); use --overwrite or another --out"
                )
            return False
        before = read_json(found).get("settings", {})
        differing = [
            key for key in {**before, **self.settings} if before.get(key) != self.settings.get(key)
        ]
        if differing:
            key = differing[0]
            raise ValueError(
                f"{self.folder}: was made with {key} {before.get(key)!r}, not {self.settings.get(key)!r}; use --overwrite or another "
                f"--out or --name"
            )
        return (self.folder / PREDICTIONS).is_file()

    def start(self, clear: bool = False) -> None:
        """Make the folder, and say in it what the predictions will depend on. clear: remove what an earlier run left."""
        try:
            if clear:
                for path in [
                    self.folder / PREDICTIONS,
                    *self.folder.glob("progress.*.jsonl"),
                    self.folder / RUN,
                ]:
                    path.unlink(missing_ok=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(RUN, json.dumps({"settings": self.settings, **self.about}, indent=1))
        except OSError as error:
            raise ValueError(f"{self.folder}: cannot be written ({error.strerror})") from error

    def done(self) -> Done:
        """The finished batches."""
        found: Done = {}
        for path in sorted(self.folder.glob("progress.*.jsonl")):
            for line in path.read_bytes().split(b"\n"):
                try:
                    entry = json.loads(line)
                except ValueError:  # torn, or empty
                    continue
                found[entry["batch"]] = entry
        return found

    def append(
        self, rank: int, batch: int, records: Sequence[Record], notes: Mapping[str, Sequence[str]]
    ) -> None:
        """Write a finished batch down, on disk before this returns."""
        line = json.dumps({"batch": batch, "records": records, "notes": notes})
        with (self.folder / f"progress.{rank}.jsonl").open("ab") as file:
            file.write(f"\n{line}\n".encode())  # the first newline ends a line that a kill has torn
            file.flush()
            os.fsync(file.fileno())

    def finish(self, batches: Sequence[Sequence[Sample]]) -> int:
        """Put pred.json together, in MileBench's order, and drop the progress; returns the number of samples with notes."""
        done = self.done()
        records, notes = [], {}
        for k, samples in enumerate(batches):
            assert k in done and [record["sample_id"] for record in done[k]["records"]] == [
                sample.sample_id for sample in samples
            ]
            records += done[k]["records"]
            notes |= done[k]["notes"]
        self._write(
            RUN,
            json.dumps(
                {"settings": self.settings, **self.about, "notes": notes},
                indent=1,
                ensure_ascii=False,
            ),
        )
        self._write(PREDICTIONS, predictions_json(records))
        for path in self.folder.glob("progress.*.jsonl"):
            path.unlink()
        return len(notes)

    def _write(self, name: str, text: str) -> None:
        """Write a file in full beside its place, then move it there."""
        staged = self.folder / f".{name}.tmp"
        staged.write_text(text, encoding="utf-8")
        os.replace(staged, self.folder / name)
