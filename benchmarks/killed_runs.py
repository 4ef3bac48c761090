"""Training runs of two CPU ranks that are killed and signalled at moments drawn from a seed, and what must hold then.

Used by fault_soak.py and by the tests. A run's ranks write markers of what they do (marked/cli.py): by them the moment
is awaited, and afterwards told.
"""

import json
import os
import pydoc_data.topics
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gpt2ds.corpus.prepare import PrepareOptions, prepare
from gpt2ds.processes import start_ticks
from gpt2ds.training.manifest import newest, verify

CLI = Path(__file__).parent / "marked" / "cli.py"
PROFILE = Path(__file__).parents[1] / "ds_configs" / "zero2.json"
RANKS = 2
START_SECONDS = 180.0
GONE_SECONDS = 60.0
GRACE_SECONDS = 30.0

# Nearly all of its time goes into the vocabulary.
MODEL = """
models:
  small:
    emb_dim: 8
    n_heads: 2
    n_layers: 2
    context_length: 16
"""


class BrokenPromiseError(AssertionError):
    """Something that must hold after a kill or a signal did not."""


def must(holds: object, words: str) -> None:
    """Raises BrokenPromiseError with these words unless it holds."""
    if not holds:
        raise BrokenPromiseError(words)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What is trained: steps, their accumulation, and how often they are saved."""

    steps: int
    accumulation: int
    save_every: int


class Marked(NamedTuple):
    """One marker: what a rank did, and when by time.monotonic()."""

    at: float
    words: str

    @property
    def in_save(self) -> bool:
        """Whether a save was under way after it."""
        return self.words.startswith("save ") and not self.words.endswith("ended")


class Process(NamedTuple):
    """One process for good: a pid alone can come again."""

    pid: int
    ticks: int | None

    @property
    def lives(self) -> bool:
        """Whether it still runs."""
        return self.ticks is not None and start_ticks(self.pid) == self.ticks


def lay_out(folder: Path) -> None:
    """Corpus (Python's own documentation topics), model and profile for runs below this folder."""
    texts = folder / "texts"
    texts.mkdir(parents=True)
    for name, text in sorted(pydoc_data.topics.topics.items())[:20]:
        (texts / f"{name}.txt").write_text(text, encoding="utf-8")
    prepare([str(texts)], folder / "corpus", options=PrepareOptions(validation_fraction=0.1, processes=1))
    (folder / "models.yaml").write_text(MODEL, encoding="utf-8")
    profile = json.loads(PROFILE.read_text(encoding="utf-8"))
    del profile["bf16"]
    (folder / "zero2_fp32.json").write_text(json.dumps(profile), encoding="utf-8")


def start_python(words: list[str], *, cwd: Path, env: Mapping[str, str], out: Path) -> "subprocess.Popen[bytes]":
    """`python WORDS`; what it prints is appended to the file out."""
    with out.open("ab") as output:
        return subprocess.Popen([sys.executable, *words], cwd=cwd, env=env, stdout=output, stderr=subprocess.STDOUT)


class Session:
    """One start of a run, from its processes to the last of them; a context manager that leaves none behind.

    how: "train" (`gpt2ds train --gpus 2`), "deepspeed" (DeepSpeed's own program) or "ranks" (no launcher at all).
    """

    def __init__(self, chain: "Chain", how: str) -> None:
        self.chain = chain
        self.how = how
        self.resumed_from = chain.newest()
        number = len(list((chain.folder / "markers").glob("*")))
        self.markers_folder = chain.folder / "markers" / f"{number:03d}"
        self.markers_folder.mkdir(parents=True)
        self.output_file = self.markers_folder / "output.txt"
        self.output_file.touch()
        self._lines_before = len(chain.lines())
        # Under nohup a hang-up would be ignored, as it should be; here it is to be a signal like the others.
        earlier = signal.signal(signal.SIGHUP, lambda *_: None)
        self.processes = self._start(chain.words())
        signal.signal(signal.SIGHUP, earlier)

    def _start(self, words: list[str]) -> list[Any]:
        environment = os.environ | {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "MARKERS": str(self.markers_folder),
        }
        where = {"cwd": self.chain.folder, "out": self.output_file}
        port = str(_free_port())
        command = [str(CLI), *words]
        if self.how == "ranks":
            group = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environments = [environment | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(RANKS)]
            return [self.chain.start_rank(command, env=each, **where) for each in environments]
        if self.how == "deepspeed":
            program = str(Path(sys.executable).with_name("deepspeed"))
            command = [program, f"--num_gpus={RANKS}", f"--master_port={port}", *command]
        else:
            command += ["--gpus", str(RANKS)]
        return [start_python(command, env=environment, **where)]

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.family():
            if process.lives:
                os.kill(process.pid, signal.SIGKILL)
        for started in self.processes:
            started.kill()
            started.wait()

    @property
    def output(self) -> str:
        """What all its processes have printed so far."""
        return self.output_file.read_text(encoding="utf-8", errors="replace")

    def markers(self, rank: int = 0) -> list[Marked]:
        """What this rank has marked so far."""
        try:
            lines = (self.markers_folder / f"rank-{rank}.txt").read_text(encoding="utf-8").split("\n")[:-1]
        except OSError:
            return []
        parts = (line.partition(" ") for line in lines)
        return [Marked(float(at), words) for at, _, words in parts]

    def ranks(self) -> list[Process]:
        """The ranks that have begun, whether they live or not."""
        starts = (next(iter(self.markers(rank)), None) for rank in range(RANKS))
        return [self._process(int(start.words.split()[1])) for start in starts if start]

    def launcher(self) -> Process:
        """DeepSpeed's launcher, the parent of the ranks."""
        return self._process(int(self.markers()[0].words.split()[2]))

    def family(self) -> list[Process]:
        """All processes of this session that are known so far."""
        found = [self._process(started.pid) for started in self.processes] + self.ranks()
        return found if self.how == "ranks" or not self.markers() else [*found, self.launcher()]

    def _process(self, pid: int) -> Process:
        return self.chain.processes.setdefault(pid, Process(pid, start_ticks(pid)))

    def until(self, happened: Callable[[], Any], seconds: float, what: str) -> None:
        """Waits until it has happened; raises BrokenPromiseError after so long."""
        deadline = time.monotonic() + seconds
        while not happened():
            must(time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}\n{self.output}")
            time.sleep(0.003)

    def until_gone(self, since: float) -> float:
        """Waits for the ranks and then for all else of this session; returns how long the ranks took."""
        self.until(lambda: not any(rank.lives for rank in self.ranks()), GONE_SECONDS, "all ranks are gone")
        seconds = time.monotonic() - since
        self.until(lambda: not any(process.lives for process in self.family()), GONE_SECONDS, "all of it is gone")
        return seconds

    def until_over(self) -> None:
        """Waits until the run has come to its end by itself."""
        self.until(lambda: None not in [it.poll() for it in self.processes], 2 * START_SECONDS, "the run ends")
        must(self.exit_codes() == [0] * len(self.processes), f"exit codes {self.exit_codes()}\n{self.output}")
        self.until_gone(time.monotonic())

    def exit_codes(self) -> list[int]:
        """Of the processes that were started here."""
        return [started.wait() for started in self.processes]

    def moment(self, at: float) -> Marked:
        """The last marker of rank 0 before that time, without the micro-batches."""
        return [mark for mark in self.markers() if mark.at <= at and not mark.words.startswith(("micro", "signal"))][-1]

    def wrote(self, kind: str) -> list[dict[str, Any]]:
        """The records of this kind that this session added to the metrics."""
        return [record for record in self.chain.lines()[self._lines_before :] if record["kind"] == kind]


class Chain:
    """One run `a`, broken and resumed as often as one likes, below a folder that `lay_out` prepared.

    start_rank: for the sessions without a launcher; called as `start_python`.
    """

    def __init__(self, folder: Path, root: Path, shape: Shape, start_rank: Callable[..., Any] = start_python) -> None:
        self.folder = folder
        self.start_rank = start_rank
        self.root = root
        self.shape = shape
        self.run = folder / "logs" / "a"
        self.processes: dict[int, Process] = {}
        folder.mkdir()

    def start(self, how: str) -> Session:
        """Starts it, or resumes it where it left off."""
        self.processes.clear()
        return Session(self, how)

    def words(self) -> list[str]:
        """The arguments of the next start."""
        if self.run.exists():
            return ["train", "--name", "a", "--resume"]
        shape = self.shape
        options = {
            "ds": self.root / "zero2_fp32.json",
            "model": "small",
            "models-file": self.root / "models.yaml",
            "data": self.root / "corpus",
            "name": "a",
            "micro-batch": 1,
            "accumulation": shape.accumulation,
            "steps": shape.steps,
            "save-every": shape.save_every,
            "keep": 2,
            "evaluate-every": 1_000_000,
            "evaluation-windows": 2,
            "sample-tokens": 1,
        }
        return ["train", *(str(word) for name, value in options.items() for word in (f"--{name}", value))]

    def lines(self) -> list[dict[str, Any]]:
        """All whole lines of the metrics; numbers with a point as they were written, without rounding."""
        found = []
        try:
            lines = (self.run / "metrics.jsonl").read_text(encoding="ascii").split("\n")
        except OSError:
            return []
        for line in lines:
            try:
                found.append(json.loads(line, parse_float=str))
            except ValueError:
                must(not line or '"kind"' in line, f"not the beginning of a record: {line!r}")
        return found

    def newest(self) -> str | None:
        """The newest checkpoint whose files all hold."""
        found = newest(self.run / "checkpoints", lambda _: None)
        return found[0] if found else None

    def last_step(self) -> int:
        """The last step in the metrics, whichever session did it."""
        return max((record["step"] for record in self.lines() if record["kind"] == "step"), default=0)

    def same_as(self, whole: "Chain") -> None:
        """Every loss as in the unbroken run, of repeated steps as well, and the last checkpoint's files byte for byte.

        Raises BrokenPromiseError.
        """
        expected = {record["step"]: record for record in whole.lines() if record["kind"] == "step"}
        steps = [record for record in self.lines() if record["kind"] == "step"]
        must({record["step"] for record in steps} == set(expected) == set(range(1, self.shape.steps + 1)), "steps lack")
        for record in steps:
            for name in ("loss", "grad_norm", "lr", "tokens"):
                found, wanted = record[name], expected[record["step"]][name]
                must(found == wanted, f"{name} of step {record['step']} is {found} instead of {wanted}")
        name = f"step-{self.shape.steps:08d}"
        files, wanted_files = (verify(chain.run / "checkpoints" / name).files for chain in (self, whole))
        must(files == wanted_files, f"{name} differs: {files} instead of {wanted_files}")
        hidden = list((self.run / "checkpoints").glob(".*"))
        must(not hidden, f"left over: {hidden}")
        must(json.loads((self.run / "outcome.json").read_text())["completed"], "no mark of a completed run")


def unbroken(folder: Path, root: Path, shape: Shape) -> tuple[Chain, list[Marked]]:
    """The run that nothing happens to, with rank 0's markers."""
    chain = Chain(folder, root, shape)
    with chain.start("ranks") as session:
        session.until_over()
        return chain, session.markers()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
