"""The command line: reads options, calls one function, prints what came back.

Also the script that DeepSpeed's launcher starts on every rank: `deepspeed gpt2ds/cli.py train --ds
ds_configs/zero2.json`.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    # Started as a script: Python has put this folder first on the path, where our modules could pass for others.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import inspect
import os
import time
from contextlib import suppress
from typing import Annotated, Any, NoReturn, get_type_hints

import typer

from gpt2ds import __version__
from gpt2ds.errors import MemoryShortageError, RankLostError, UserError, readable
from gpt2ds.options import DEFAULTS, WHAT, TrainOptions

OTHER_RANKS_WAIT_SECONDS = 5.0

app = typer.Typer(
    name="gpt2ds",
    help="Trains GPT-2 from scratch with DeepSpeed on a few 24 GB cards, and knows the memory before the run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or its name below logs/.")]
WeightsArgument = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="A run folder or its name below logs/, an exported folder, or a weights file."),
]


def main() -> NoReturn:
    """Entry point: a user's mistake becomes one message and exit code 2, memory that ran out one and exit code 3,
    a rank that was lost one and exit code 1.
    """
    try:
        app(prog_name="gpt2ds", standalone_mode=True)
        code = 0
    except UserError as error:
        _tell_once(f"Error: {error}" if "\n" not in str(error) else f"Errors:\n{error}")
        code = 2
    except MemoryShortageError as error:
        _tell_once(str(error))
        code = 3
    except RankLostError as error:
        _tell_once(str(error), first=error.speaks)
        code = 1
    except KeyboardInterrupt:
        code = 130
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    if "deepspeed" in sys.modules:
        # The run is over and all of it on the disk. Taking the interpreter down in the usual way lets gloo's threads
        # abort the process now and then (two busy CPU ranks: 3 of 20 exits), and the launcher calls that a failure.
        with suppress(OSError):  # they may be files on a full disk
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


def _tell_once(message: str, first: bool | None = None) -> None:
    # Every rank of a node comes to the same end, and the first one says so. Another speaks only if it is alone with
    # it: the launcher ends it within a second when the first one has left.
    if not (os.environ.get("LOCAL_RANK", "0") == "0" if first is None else first):
        time.sleep(OTHER_RANKS_WAIT_SECONDS)
    with suppress(OSError):
        print(readable(message), file=sys.stderr, flush=True)


@app.callback(invoke_without_command=True)
def options_for_all(
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = -1,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Takes what the launcher puts before the command; the rank itself is read from the environment."""
    if version:
        print(f"gpt2ds {__version__}")
        raise typer.Exit


def train(gpus: int | None, restarts: int | None, **given: Any) -> None:
    """Train a GPT-2; writes the run folder with metrics, checkpoints, plots and the training log.

    Alone (one rank), with --gpus N, or under a launcher: deepspeed gpt2ds/cli.py train --ds ds_configs/zero2.json
    """
    from gpt2ds.train_command import run_train

    options = TrainOptions(**given)
    raise SystemExit(run_train(options, sys.argv[1:], gpus=gpus, restarts=restarts, say=_say, tell=_tell))


def _train_signature() -> inspect.Signature:
    """The options of `train`: --gpus, --restarts, and every field of TrainOptions with the help beside it."""
    about_gpus = typer.Option(
        metavar="N", help="Start N ranks on this machine through the launcher. Default: 1.", rich_help_panel=WHAT
    )
    about_restarts = typer.Option(
        metavar="N",
        min=0,
        help="Start again up to N times when a rank or the launcher dies: from the last complete checkpoint, or from "
        "the start. Default: 0.",
        rich_help_panel=WHAT,
    )
    annotations: dict[str, Any] = {
        "gpus": Annotated[int | None, about_gpus],
        "restarts": Annotated[int | None, about_restarts],
    }
    defaults: dict[str, Any] = {"gpus": None, "restarts": None}
    for name, kind in get_type_hints(TrainOptions).items():
        field = TrainOptions.__dataclass_fields__[name]
        metadata = field.metadata
        stated = f" Default: {DEFAULTS[name][0]}." if name in DEFAULTS else ""
        flag = f"--{name.replace('_', '-')}"
        about = typer.Option(
            flag, metavar=metadata["metavar"], help=metadata["help"] + stated, rich_help_panel=metadata["panel"]
        )
        annotations[name], defaults[name] = Annotated[kind, about], field.default
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=annotation)
        for name, annotation in annotations.items()
    ]
    train.__annotations__ = annotations
    return inspect.Signature(parameters)


train.__signature__ = _train_signature()  # type: ignore[attr-defined]
app.command()(train)


@app.command()
def prepare(
    text: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT...", help="Files, folders, globs. Default: the embedded text.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where the shards go.")] = None,
    end_of_text: Annotated[
        str, typer.Option(metavar="POLICY", help="<|endoftext|> in the text: boundary of documents, text, or refuse.")
    ] = "boundary",
    separator: Annotated[
        str | None,
        typer.Option(help="Text between documents, \\n for a line end, \\t for a tab. Default: a file is a document."),
    ] = None,
    encoding: Annotated[str, typer.Option(help="Of the text files.")] = "utf-8",
    validation: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of the text kept for validation, in whole documents.")
    ] = 0.01,
    packages: Annotated[
        str,
        typer.Option(metavar="NAMES", help="More embedded text: torch, numpy, sympy, networkx (with commas)."),
    ] = "",
    processes: Annotated[int | None, typer.Option(metavar="N", help="Default: one per core.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.")] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Chooses the validation documents.")] = 1337,
) -> None:
    """Turn text into token shards: parallel, resumable, byte-identical however many processes."""
    from gpt2ds.corpus.embedded import EMBEDDED_FOLDER, prepare_embedded
    from gpt2ds.corpus.prepare import PrepareOptions
    from gpt2ds.corpus.prepare import prepare as run_prepare
    from gpt2ds.runlog.progress import byte_progress

    if text and out is None:
        raise UserError("Say where the shards go: --out data/NAME.")
    if not text and (separator or (end_of_text, encoding, validation) != ("boundary", "utf-8", 0.01)):
        raise UserError("--end-of-text, --separator, --encoding and --validation are for your own text: name it.")
    if text and packages:
        raise UserError("--packages adds to the embedded text: leave it out, or leave your own text out.")
    with byte_progress() as progress:
        if not text:
            named = tuple(name.strip() for name in packages.split(",") if name.strip())
            corpus = prepare_embedded(out or EMBEDDED_FOLDER, named, progress)
        else:
            assert out is not None
            options = PrepareOptions(
                end_of_text=end_of_text,  # type: ignore[arg-type]  # checked there, with a sentence
                separator=separator.replace("\\n", "\n").replace("\\t", "\t") if separator else None,
                encoding=encoding,
                validation_fraction=validation,
                processes=processes,
                overwrite=overwrite,
                seed=seed,
            )
            corpus = run_prepare(text, out, options=options, progress=progress, note=progress.note)
    print(
        f"{corpus.folder}: {corpus.train_tokens:,} training and {corpus.val_tokens:,} validation tokens "
        f"in {len(corpus.train) + len(corpus.val)} shards, digest {corpus.digest[:12]}"
    )


@app.command()
def generate(
    run: WeightsArgument,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Only among the K likeliest; 0 for all.")] = 50,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
) -> None:
    """Continue a text with the newest checkpoint of a run."""
    from gpt2ds.training.inference import continue_text, load_run

    model, _ = load_run(_run_folder(run), _tell)
    for piece in continue_text(model, prompt, tokens=tokens, temperature=temperature, top_k=top_k or None, seed=seed):
        print(piece, end="", flush=True)
    print()


@app.command()
def evaluate(
    run: WeightsArgument,
    data: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Default: the run's own validation text.")] = None,
    windows: Annotated[
        int | None, typer.Option(metavar="N", help="Windows looked at, evenly spread. Default: all.")
    ] = None,
    micro_batch: Annotated[int, typer.Option(metavar="N", help="Windows at a time.")] = 8,
) -> None:
    """Validation loss and perplexity of a run's newest checkpoint, over the whole validation text."""
    from gpt2ds.training.inference import load_run, validation_folder, validation_loss

    folder = _run_folder(run)
    model, position = load_run(folder, _tell)
    data = data or validation_folder(folder)
    result = validation_loss(model, data, windows=windows, micro_batch=micro_batch)
    where = f"step {position.step:,}" if position else str(run)
    print(
        f"{where}: validation loss {result.loss:.4f}, perplexity {result.perplexity:.2f} "
        f"over {result.windows:,} windows ({result.tokens:,} tokens) of {data}"
    )


@app.command()
def export(
    run: WeightsArgument,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where it goes; must be empty or not there.")],
    checkpoint: Annotated[
        str, typer.Option(metavar="NAME", help="newest, best (by validation loss), or a checkpoint's name.")
    ] = "newest",
    dtype: Annotated[
        str | None, typer.Option(metavar="TYPE", help="fp32, bf16 or fp16. Default: the checkpoint's.")
    ] = None,
) -> None:
    """Write a run's weights as a folder that Hugging Face's transformers opens, with tokenizer and model card."""
    from gpt2ds.training.export import export as run_export

    made = run_export(_run_folder(run), out, checkpoint=checkpoint, dtype=dtype, tell=_tell)
    where = f" at step {made.step:,}" if made.step is not None else ""
    print(
        f"{made.folder}: {made.model.name}{where}, {made.model.parameters:,} parameters in {made.dtype}, "
        f"{made.size_bytes / 1e6:,.1f} MB. In Python: AutoModelForCausalLM.from_pretrained({str(made.folder)!r})"
    )


@app.command()
def report(run: RunArgument) -> None:
    """Write the training log of a run again, with its pictures."""
    from gpt2ds.runlog.report import write_report

    print(write_report(_run_folder(run)))


@app.command()
def bench(
    ds: Annotated[
        list[str] | None,
        typer.Option(metavar="JSON", help="DeepSpeed profile, as often as wanted. Default: all shipped ones."),
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Default: as in training.")] = None,
    models_file: Annotated[Path | None, typer.Option(metavar="YAML", help="Sizes of your own.")] = None,
    data: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Default: the embedded text.")] = None,
    micro_batch: Annotated[
        list[int] | None, typer.Option(metavar="N", help="As often as wanted. Default: the profile's.")
    ] = None,
    recompute: Annotated[
        list[str] | None, typer.Option(metavar="POLICY", help="As often as wanted. Default: the profile's.")
    ] = None,
    accumulation: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Micro-batches per optimizer step. Not the profile's, so that a step is short: 2 are enough to see "
            "the accumulation's memory.",
        ),
    ] = 2,
    context: Annotated[int | None, typer.Option(metavar="TOKENS", help="Default: the model's.")] = None,
    gpus: Annotated[int, typer.Option(metavar="N", help="Ranks on this machine.")] = 1,
    gpu_memory: Annotated[
        float | None,
        typer.Option(metavar="GB", help="As if on a card of so many GB: 24 caps the allocator at 23,700 MiB."),
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N", help="Optimizer steps that are timed, after 2 that are not.")] = 5,
    largest: Annotated[
        bool,
        typer.Option(
            "--largest", help="Find the largest micro-batch that runs, and the next one that does not, by real runs."
        ),
    ] = False,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Limit for each setting.")] = 600.0,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="For bench.json and bench.png. Default: logs/bench-TIME.")
    ] = None,
) -> None:
    """Measure speed and memory: a few real steps of every profile and setting, each in a fresh process."""
    from gpt2ds.devices import prepare_cuda
    from gpt2ds.probe.bench import run_bench
    from gpt2ds.probe.bench_report import show
    from gpt2ds.probe.bench_settings import BenchOptions

    prepare_cuda()
    options = BenchOptions(
        ds=tuple(ds or ()),
        model=model,
        models_file=models_file,
        data=data,
        micro_batch=tuple(micro_batch or ()),
        recompute=tuple(recompute or ()),
        accumulation=accumulation,
        context=context,
        gpus=gpus,
        gpu_memory=gpu_memory,
        steps=steps,
        largest=largest,
        timeout_seconds=timeout,
        out=out,
    )
    results, folder = run_bench(options, _tell)
    show(results, folder)
    if any(record["result"] in ("crashed", "timed out") for record in results["settings"]):
        raise SystemExit(1)


@app.command()
def memory_estimate(
    model: Annotated[
        str, typer.Option(metavar="NAME", help="gpt2_tiny, _small, _medium, _large or _xl.")
    ] = "gpt2_large",
    models_file: Annotated[Path | None, typer.Option(metavar="YAML", help="Sizes of your own.")] = None,
    ds: Annotated[
        list[str] | None,
        typer.Option(metavar="JSON", help="DeepSpeed profile, as often as wanted. Default: all shipped ones."),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(metavar="N", help="GPUs of all nodes together. Default: those of this machine, or 1.")
    ] = None,
    nodes: Annotated[int, typer.Option(metavar="N", help="Machines that share them.")] = 1,
    gpu_memory: Annotated[
        float | None,
        typer.Option(metavar="GB", help="Of each card. Default: what is free on this machine's; 24 without a GPU."),
    ] = None,
    micro_batch: Annotated[int | None, typer.Option(metavar="N", help="Default: the profile's.")] = None,
    accumulation: Annotated[int | None, typer.Option(metavar="N", help="Default: the profile's.")] = None,
    context: Annotated[int | None, typer.Option(metavar="TOKENS", help="Default: the model's.")] = None,
    recompute: Annotated[str | None, typer.Option(metavar="POLICY", help="Default: the profile's.")] = None,
    loss_chunk: Annotated[int | None, typer.Option(metavar="TOKENS", help="Default: the profile's.")] = None,
    global_batch: Annotated[
        int | None, typer.Option(metavar="N", help="Sequences per optimizer step. Default: the profile's.")
    ] = None,
    fit: Annotated[bool, typer.Option("--fit", help="Find the fastest plan that fits, at one global batch.")] = False,
    write: Annotated[Path | None, typer.Option(metavar="JSON", help="With --fit: write the plan as a profile.")] = None,
    parts: Annotated[
        bool,
        typer.Option("--explain", help="Show what each peak is made of, and why mixed precision alone saves nothing."),
    ] = False,
    plot: Annotated[Path | None, typer.Option(metavar="PNG", help="Draw what each peak is made of.")] = None,
    trace: Annotated[
        bool,
        typer.Option("--trace", help="Run each through the real DeepSpeed engine on meta tensors: 10 to 60 s, no GPU."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Say what every profile takes on a GPU, before the run.

    Exit code 1 when nothing fits, with --fit no plan; 2 for a mistake, and when nothing of what --ds names has any
    chance to fit.
    """
    from gpt2ds.estimate.answer import Wanted, answer
    from gpt2ds.estimate.rows import EstimateOptions

    options = EstimateOptions(
        model=model,
        models_file=models_file,
        ds=tuple(ds or ()),
        gpus=gpus,
        nodes=nodes,
        gpu_memory=gpu_memory,
        micro_batch=micro_batch,
        accumulation=accumulation,
        context=context,
        recompute=recompute,
        loss_chunk=loss_chunk,
        global_batch=global_batch,
    )
    wanted = Wanted(fit=fit, write=write, parts=parts, plot=plot, trace=trace, as_json=as_json)
    raise SystemExit(answer(options, wanted))


@app.command()
def doctor(
    ds: Annotated[
        str | None, typer.Option(metavar="JSON", help="DeepSpeed profile: a file, or the name of a shipped one.")
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Default: what training would take.")] = None,
    gpus: Annotated[int | None, typer.Option(metavar="N", help="Ranks on this machine. Default: all GPUs.")] = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where run folders would be.")] = Path("logs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """Say what would go wrong with a run, before it does: driver, compilers, locks, disk, memory, an all-reduce.

    Exit code 1 when there is a problem; warnings alone are 0.
    """
    from gpt2ds.doctor.examination import DoctorOptions, examine
    from gpt2ds.doctor.report import show

    if show(examine(DoctorOptions(ds=ds, model=model, gpus=gpus, out=out)), as_json=as_json):
        raise SystemExit(1)


@app.command()
def profiles() -> None:
    """What each shipped DeepSpeed profile is for."""
    from rich.console import Console
    from rich.padding import Padding

    from gpt2ds.ds_profile import load_profile, shipped_profiles

    console = Console(highlight=False)
    for path in shipped_profiles():
        profile = load_profile(path)
        places = {"optimizer": profile.offload_optimizer, "parameters": profile.offload_param}
        facts = [f"ZeRO-{profile.zero_stage}", profile.dtype, f"micro-batch {profile.micro_batch}"]
        facts += [f"accumulation {profile.accumulation}"]
        facts += [f"{part} on the {place}" for part, place in places.items() if place]
        facts += [f"recompute {profile.recompute}"] if profile.recompute != "none" else []
        console.print(f"[bold]{path.name}[/bold]  {', '.join(facts)}")
        console.print(Padding(f"{profile.description} {profile.use_when}", (0, 0, 0 if profile.risk else 1, 4)))
        if profile.risk:
            console.print(Padding(f"Risk: {profile.risk}", (0, 0, 1, 4)), style="yellow")


def _say(text: str) -> None:
    with suppress(OSError):  # standard output may be a file on a full disk
        print(text, flush=True)


def _tell(sentence: str) -> None:
    print(readable(sentence), file=sys.stderr)


def _run_folder(run: Path) -> Path:
    """The folder itself, or the run of that name below logs/."""
    try:
        return run if run.exists() or not (Path("logs") / run).exists() else Path("logs") / run
    except OSError as error:
        raise UserError(f"{run} cannot be looked into ({error.strerror}): give the path of a run folder.") from error


if __name__ == "__main__":
    main()
