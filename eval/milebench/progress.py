"""The folder of one task's predictions while they are made.

    <out>/<model>/<Dataset>/run.json               what the predictions depend on, and notes
    <out>/<model>/<Dataset>/progress.<rank>.jsonl  a line for each finished batch of one process
    <out>/<model>/<Dataset>/pred.json              all predictions, when the last batch is done

Nothing is lost to a killed run, and nothing is doubled. A batch is the unit: it is always made of
the same samples, so that neither a restart nor the number of processes changes what is padded with
what. A line that a kill has torn is not JSON, and its batch is made again.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.milebench.predictions import Record, predictions_json
from eval.milebench.tasks import Sample, read_json
from fmtrain.command_line import write_whole

PREDICTIONS, RUN = "pred.json", "run.json"

Done = dict[int, dict[str, Any]]  # {index of a batch: its line}


@dataclass(frozen=True)
class TaskRun:
    """One task under one mask.

    settings: all that the predictions depend on; about: what else is worth recording.
    """

    folder: Path
    settings: Mapping[str, Any]
    about: Mapping[str, Any]

    def check(self) -> bool:
        """Whether the task is finished.

        Raises `ValueError` for a folder that holds predictions made in another way.
        """
        path = self.folder / RUN
        if not path.is_file():
            if (self.folder / PREDICTIONS).exists():
                raise ValueError(
                    f"{self.folder / PREDICTIONS}: is not from here (there is no {RUN}); "
                    "use --overwrite or another --out"
                )
            return False
        before = read_json(path).get("settings", {})
        for key in {**before, **self.settings}:
            if before.get(key) != self.settings.get(key):
                raise ValueError(
                    f"{self.folder}: was made with {key} {before.get(key)!r}, not "
                    f"{self.settings.get(key)!r}; use --overwrite or another --out or --name"
                )
        return (self.folder / PREDICTIONS).is_file()

    def start(self, clear: bool = False) -> None:
        """Make the folder, and say in it what the predictions will depend on.

        clear: remove what an earlier run left.
        """
        try:
            if clear:
                (self.folder / PREDICTIONS).unlink(missing_ok=True)
                (self.folder / RUN).unlink(missing_ok=True)
                self._drop_progress()
            self._write_run()
        except OSError as error:
            raise ValueError(f"{self.folder}: cannot be written ({error.strerror})") from error

    def done(self) -> Done:
        """The finished batches."""
        done: Done = {}
        for path in sorted(self.folder.glob("progress.*.jsonl")):
            for line in path.read_bytes().split(b"\n"):
                try:
                    entry = json.loads(line)
                except ValueError:  # torn, or empty
                    continue
                done[entry["batch"]] = entry
        return done

    def append(
        self, rank: int, batch: int, records: Sequence[Record], notes: Mapping[str, Sequence[str]]
    ) -> None:
        """Write a finished batch down, on disk before this returns."""
        line = json.dumps({"batch": batch, "records": records, "notes": notes})
        with (self.folder / f"progress.{rank}.jsonl").open("ab") as file:
            # The first newline ends a line that a kill has torn.
            file.write(f"\n{line}\n".encode())
            file.flush()
            os.fsync(file.fileno())

    def finish(self, batches: Sequence[Sequence[Sample]]) -> int:
        """Put pred.json together, in MileBench's order, and drop the progress.

        Returns the number of samples with notes.
        """
        done, records, notes = self.done(), [], {}
        for k, samples in enumerate(batches):
            ids = [record["sample_id"] for record in done[k]["records"]]
            assert ids == [sample.sample_id for sample in samples]
            records += done[k]["records"]
            notes |= done[k]["notes"]
        self._write_run(notes=notes)
        write_whole(self.folder / PREDICTIONS, predictions_json(records))
        self._drop_progress()
        return len(notes)

    def _write_run(self, **more) -> None:
        record = {"settings": self.settings, **self.about, **more}
        write_whole(self.folder / RUN, json.dumps(record, indent=1, ensure_ascii=False))

    def _drop_progress(self) -> None:
        for path in self.folder.glob("progress.*.jsonl"):
            path.unlink()
