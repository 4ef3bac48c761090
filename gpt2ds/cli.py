"""The command line: reads options, calls one function, prints what came back.

Also the script that DeepSpeed's launcher starts on every rank: `deepspeed gpt2ds/cli.py train --ds ds_configs/zero2.json`.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    # Started as a script: Python has put this folder first on the path, where our modules could pass for others.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import os
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Optional

import typer

from gpt2ds import __version__
from gpt2ds.errors import UserError

if TYPE_CHECKING:
    from gpt2ds.plan import Plan
    from gpt2ds.runlog.metrics import Recorder

app = typer.Typer(
    name="gpt2ds",
    help="Trains GPT-2 from scratch with DeepSpeed on a few 24 GB cards, and knows the memory before the run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or its name below logs/.")]


def main() -> None:
    """Entry point: a user's mistake becomes one message and exit code 2."""
    try:
        app(prog_name="gpt2ds")
    except UserError as error:
        _fail(error)


def _fail(error: UserError) -> NoReturn:
    # Every rank of a node finds the same mistake; one of them says so.
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"Error: {error}" if "\n" not in str(error) else f"Errors:\n{error}", file=sys.stderr, flush=True)
    raise SystemExit(2)


@app.callback(invoke_without_command=True)
def options_for_all(
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = -1,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Takes what the launcher puts before the command; the rank itself is read from the environment."""
    if version:
        print(f"gpt2ds {__version__}")
        raise typer.Exit


@app.command()
def train(
    ds: Annotated[Optional[str], typer.Option(metavar="JSON", help="DeepSpeed profile: a file, or the name of a shipped one. [default: zero2.json]", rich_help_panel="What to train")] = None,
    model: Annotated[Optional[str], typer.Option(help="gpt2_tiny, gpt2_small, gpt2_medium, gpt2_large or gpt2_xl. [default: the largest predicted to fit; gpt2_tiny on a CPU]", rich_help_panel="What to train")] = None,
    models_file: Annotated[Optional[Path], typer.Option(metavar="YAML", help="Sizes of your own, under a section 'models:'.", rich_help_panel="What to train")] = None,
    data: Annotated[Optional[Path], typer.Option(metavar="FOLDER", help="What `gpt2ds prepare` wrote, or llm.c or nanoGPT shards. [default: the embedded text]", rich_help_panel="What to train")] = None,
    run: Annotated[Optional[str], typer.Option(metavar="NAME", help="Name of the run folder. [default: date and time]", rich_help_panel="What to train")] = None,
    logs: Annotated[Path, typer.Option(metavar="FOLDER", help="Where run folders are.", rich_help_panel="What to train")] = Path("logs"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with --run, or with the newest run, from its newest complete checkpoint.", rich_help_panel="What to train")] = False,
    gpus: Annotated[Optional[int], typer.Option(metavar="N", help="Start N ranks on this machine through the launcher (CPUs too). [default: 1]", rich_help_panel="What to train")] = None,
    micro_batch: Annotated[Optional[int], typer.Option(metavar="N", help="Sequences per rank at a time. [default: the profile's]", rich_help_panel="Batch and memory")] = None,
    accumulation: Annotated[Optional[int], typer.Option(metavar="N", help="Micro-batches per optimizer step. [default: the profile's]", rich_help_panel="Batch and memory")] = None,
    context: Annotated[Optional[int], typer.Option(metavar="TOKENS", help="Tokens per sequence. [default: the model's]", rich_help_panel="Batch and memory")] = None,
    recompute: Annotated[Optional[str], typer.Option(metavar="POLICY", help="Activation checkpointing: none or full. [default: the profile's]", rich_help_panel="Batch and memory")] = None,
    gpu_memory: Annotated[Optional[float], typer.Option(metavar="GB", help="Train as if on a card of so many GB: 24 caps torch at 23,700 MiB.", rich_help_panel="Batch and memory")] = None,
    steps: Annotated[Optional[int], typer.Option(metavar="N", help="End after N optimizer steps. [default: one pass over the text]", rich_help_panel="How long and how fast")] = None,
    tokens: Annotated[Optional[int], typer.Option(metavar="N", help="End after N tokens.", rich_help_panel="How long and how fast")] = None,
    hours: Annotated[Optional[float], typer.Option(metavar="H", help="End after H hours; the schedule is fitted to the measured speed.", rich_help_panel="How long and how fast")] = None,
    schedule: Annotated[Optional[str], typer.Option(metavar="KIND", help="cosine, wsd (warm-up, stable, decay) or constant, all with warm-up. [default: cosine]", rich_help_panel="How long and how fast")] = None,
    lr: Annotated[Optional[float], typer.Option(metavar="RATE", help="Peak learning rate. [default: by model size]", rich_help_panel="How long and how fast")] = None,
    warmup_steps: Annotated[Optional[int], typer.Option(metavar="N", help="Steps of linear warm-up. [default: 5% of the steps, at most 700]", rich_help_panel="How long and how fast")] = None,
    evaluate_every: Annotated[Optional[int], typer.Option(metavar="STEPS", help="Steps between evaluations. [default: 20 over the run]", rich_help_panel="Evaluation and checkpoints")] = None,
    evaluation_windows: Annotated[Optional[int], typer.Option(metavar="N", help="Validation windows looked at. [default: 256; 64 on a CPU]", rich_help_panel="Evaluation and checkpoints")] = None,
    evaluation_micro_batch: Annotated[Optional[int], typer.Option(metavar="N", help="Validation windows at a time. [default: 8]", rich_help_panel="Evaluation and checkpoints")] = None,
    sample_prompt: Annotated[Optional[str], typer.Option(metavar="TEXT", help="Continued at every evaluation. [default: Fruits are good for you because]", rich_help_panel="Evaluation and checkpoints")] = None,
    sample_tokens: Annotated[Optional[int], typer.Option(metavar="N", help="Tokens of each sample. [default: 48]", rich_help_panel="Evaluation and checkpoints")] = None,
    save_every: Annotated[Optional[int], typer.Option(metavar="STEPS", help="Steps between checkpoints, instead of minutes.", rich_help_panel="Evaluation and checkpoints")] = None,
    save_minutes: Annotated[Optional[float], typer.Option(metavar="MIN", help="Minutes between checkpoints. [default: 30]", rich_help_panel="Evaluation and checkpoints")] = None,
    keep: Annotated[Optional[int], typer.Option(metavar="N", help="Checkpoints kept. [default: 2]", rich_help_panel="Evaluation and checkpoints")] = None,
    seed: Annotated[Optional[int], typer.Option(metavar="N", help="Of weights, data order and dropout. [default: 1337]", rich_help_panel="Evaluation and checkpoints")] = None,
) -> None:  # fmt: skip
    """Train a GPT-2; writes the run folder with metrics, checkpoints, plots and the training log.

    Alone (one rank), with --gpus N, or under a launcher: deepspeed gpt2ds/cli.py train --ds ds_configs/zero2.json
    """
    given = {name: value for name, value in locals().items() if name != "gpus"}
    from gpt2ds import launcher
    from gpt2ds.options import TrainOptions

    if gpus is not None and not launcher.under_launcher():
        raise SystemExit(launcher.launch(gpus, _without_option(sys.argv[1:], "--gpus")))
    from gpt2ds.plan import resolve

    plan = resolve(TrainOptions(**given), ranks=int(os.environ.get("WORLD_SIZE", "1")))
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if plan.device_kind == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed looks for one, and says so
    from gpt2ds.training.loop import train as run_training

    outcome = run_training(plan, _recorder)
    if outcome.is_main:
        from gpt2ds.runlog.report import write_report

        print(f"{outcome.reason} at step {outcome.step:,}. Training log: {write_report(outcome.folder)}")
        if not outcome.completed:
            print(f"Resume with: gpt2ds train --run {outcome.folder.name} --resume")
    raise SystemExit(1 if outcome.failed else 0)


def _recorder(plan: "Plan") -> "Recorder":
    from gpt2ds.runlog.console import console_view
    from gpt2ds.runlog.metrics import RunLog

    return RunLog(plan.folder, [console_view(plan.to_dict())])


def _without_option(arguments: list[str], name: str) -> list[str]:
    kept, skip = [], False
    for argument in arguments:
        if not skip and not argument.startswith(f"{name}=") and argument != name:
            kept.append(argument)
        skip = argument == name and not skip
    return kept


@app.command()
def prepare(
    text: Annotated[Optional[list[str]], typer.Argument(metavar="TEXT...", help="Text files, folders or globs. [default: the embedded text]")] = None,
    out: Annotated[Optional[Path], typer.Option(metavar="FOLDER", help="Where the shards go. [default: data/embedded for the embedded text]")] = None,
    end_of_text: Annotated[str, typer.Option(help="<|endoftext|> in the text: boundary (ends a document), text, or refuse.")] = "boundary",
    separator: Annotated[Optional[str], typer.Option(help="Text between documents; \\n is a line end. [default: a file is a document]")] = None,
    encoding: Annotated[str, typer.Option(help="Of the text files.")] = "utf-8",
    validation: Annotated[float, typer.Option(help="Share of the text kept for validation, in whole documents.")] = 0.01,
    packages: Annotated[str, typer.Option(help="For the embedded text, more documentation: torch, numpy, sympy, networkx, deepspeed; comma-separated.")] = "",
    processes: Annotated[Optional[int], typer.Option(help="[default: one per core]")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.")] = False,
    seed: Annotated[int, typer.Option(help="Chooses the validation documents.")] = 1337,
) -> None:  # fmt: skip
    """Turn text into token shards: parallel, resumable, byte-identical however many processes."""
    from gpt2ds.corpus.embedded import prepare_embedded
    from gpt2ds.corpus.prepare import PrepareOptions
    from gpt2ds.corpus.prepare import prepare as run_prepare
    from gpt2ds.runlog.progress import byte_progress

    if text and out is None:
        raise UserError("Say where the shards go: --out data/NAME.")
    with byte_progress() as progress:
        if not text:
            named = tuple(name.strip() for name in packages.split(",") if name.strip())
            corpus = prepare_embedded(out or Path("data/embedded"), named, progress)
        else:
            assert out is not None
            options = PrepareOptions(
                end_of_text=end_of_text,  # type: ignore[arg-type]  # checked there, with a sentence
                separator=separator.encode().decode("unicode_escape") if separator else None,
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
    run: RunArgument,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Only among the K likeliest; 0 for all.")] = 50,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
) -> None:
    """Continue a text with the newest checkpoint of a run."""
    from gpt2ds.training.inference import continue_text

    for piece in continue_text(
        _run_folder(run), prompt, tokens=tokens, temperature=temperature, top_k=top_k or None, seed=seed
    ):
        print(piece, end="", flush=True)
    print()


@app.command()
def evaluate(
    run: RunArgument,
    data: Annotated[Optional[Path], typer.Option(metavar="FOLDER", help="[default: the run's own validation text]")] = None,
    windows: Annotated[Optional[int], typer.Option(help="Windows looked at, evenly spread. [default: all]")] = None,
    micro_batch: Annotated[int, typer.Option(help="Windows at a time.")] = 8,
) -> None:  # fmt: skip
    """Validation loss and perplexity of a run's newest checkpoint, over the whole validation text."""
    from gpt2ds.training.inference import validation_loss

    result = validation_loss(_run_folder(run), data, windows=windows, micro_batch=micro_batch)
    print(
        f"step {result.step:,}: validation loss {result.loss:.4f}, perplexity {result.perplexity:.2f} "
        f"over {result.windows:,} windows ({result.tokens:,} tokens) of {result.folder}"
    )


@app.command()
def report(run: RunArgument) -> None:
    """Write the training log of a run again, with its pictures."""
    from gpt2ds.runlog.report import write_report

    print(write_report(_run_folder(run)))


@app.command()
def profiles() -> None:
    """What each shipped DeepSpeed profile is for."""
    from rich.console import Console
    from rich.table import Table

    from gpt2ds.ds_profile import load_profile, shipped_profiles

    table = Table("profile", "ZeRO", "dtype", "offload", "recompute", "micro-batch × accumulation", "what it is for")
    for profile in map(load_profile, shipped_profiles()):
        offloaded = [name for name, to in (("optimizer", profile.offload_optimizer), ("parameters", profile.offload_param)) if to]
        table.add_row(
            profile.name,
            str(profile.zero_stage),
            profile.dtype,
            ", ".join(offloaded) or "no",
            profile.recompute,
            f"{profile.micro_batch} × {profile.accumulation}",
            f"{profile.description} {profile.use_when}".strip(),
        )
    Console().print(table)


def _run_folder(run: Path) -> Path:
    """The folder itself, or the run of that name below logs/."""
    return run if run.exists() or not (Path("logs") / run).exists() else Path("logs") / run


if __name__ == "__main__":
    main()
