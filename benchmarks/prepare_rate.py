"""How fast `gpt2ds prepare` encodes, against bare tiktoken on one core: python benchmarks/prepare_rate.py
TEXT_FOLDER --megabytes 600

The files of the folder are copied until they reach the size. Each round measures `encode_ordinary` on one core over
the folder's text (already decoded, in memory) and then the whole of `prepare` (reading, checking, encoding, writing,
hashing) over the copies. The goal is a ratio of 0.9.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from gpt2ds.corpus.prepare import PrepareOptions, prepare
from gpt2ds.corpus.sources import Source, gather
from gpt2ds.corpus.tokenizer import load_tokenizer
from gpt2ds.devices import this_machine

RESULTS = Path(__file__).parent / "results"


def bare_rate(texts: list[str], text_bytes: int) -> float:
    """MB/s of tiktoken's encode_ordinary on one core."""
    tokenizer = load_tokenizer()
    start = time.perf_counter()
    for text in texts:
        tokenizer.encode_ordinary(text)
    return text_bytes / 1e6 / (time.perf_counter() - start)


def repeat_files(sources: tuple[Source, ...], folder: Path, wanted_bytes: int) -> int:
    """Copies the files, round after round, until the copies hold `wanted_bytes`; returns their size."""
    copied = 0
    while copied < wanted_bytes:
        before = copied
        for number, source in enumerate(sources):
            if copied < wanted_bytes:
                shutil.copyfile(source.path, folder / f"{before:012d}-{number:06d}.txt")
                copied += source.size_bytes
    return copied


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="a folder of text files")
    parser.add_argument("--megabytes", type=int, default=600, help="size of the text to prepare (default 600)")
    parser.add_argument("--rounds", type=int, default=2, help="how often both are measured, in turn (default 2)")
    parser.add_argument("--processes", type=int, default=None, help="default: one per core")
    parser.add_argument("--one-file", action="store_true", help="prepare the copies as one single document")
    parser.add_argument(
        "--work", type=Path, default=None, help="folder for the copies and shards (default: a temporary one)"
    )
    arguments = parser.parse_args()

    cores = len(os.sched_getaffinity(0))
    processes = arguments.processes or cores
    sources = gather([arguments.text]).sources
    texts = [source.path.read_text(encoding="utf-8") for source in sources]
    base_bytes = sum(source.size_bytes for source in sources)
    bare: list[float] = []
    whole: list[float] = []
    tokens = 0
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        copies = Path(work, "text")
        copies.mkdir()
        size = repeat_files(sources, copies, arguments.megabytes * 1_000_000)
        if arguments.one_file:
            with Path(work, "one.txt").open("wb") as joined:
                for path in sorted(copies.iterdir()):
                    joined.write(path.read_bytes())
            shutil.rmtree(copies)
            copies = Path(work, "one.txt")
        for _ in range(arguments.rounds):
            bare.append(bare_rate(texts, base_bytes))
            out = Path(work, "out")
            start = time.perf_counter()
            corpus = prepare([str(copies)], out, options=PrepareOptions(processes=processes))
            whole.append(size / 1e6 / (time.perf_counter() - start))
            tokens = corpus.train_tokens + corpus.val_tokens
            shutil.rmtree(out)

    goal = statistics.median(bare) * min(processes, cores)
    ratio = statistics.median(whole) / goal
    print(f"{platform.machine()}, {cores} cores, {processes} processes, {size / 1e6:.0f} MB, {tokens:,} tokens")
    print(f"{'':24}{'MB/s':>10}{'of cores x bare':>18}")
    print(f"{'tiktoken, one core':24}{statistics.median(bare):>10.1f}")
    print(f"{'prepare':24}{statistics.median(whole):>10.1f}{ratio:>18.3f}")
    machine = this_machine()
    result = {
        "what": "MB/s of text encoded: tiktoken on one core, and the whole of prepare, round by round",
        "machine": {"cpu": machine.cpu_name, "cores": machine.cores, "gpu": None},
        "megabytes": size / 1e6,
        "tokens": tokens,
        "cores": cores,
        "processes": processes,
        "one_file": arguments.one_file,
        "bare_mb_per_second": bare,
        "prepare_mb_per_second": whole,
        "ratio": ratio,
        "peak_parent_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "peak_worker_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "prepare_rate.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
