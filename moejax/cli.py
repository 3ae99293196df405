"""The ``moejax`` command."""

import json
import os
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Load, explain and train Mixture-of-Experts language models in JAX.",
)

Model = Annotated[str, typer.Option("--model", "-m", help="Bundled name, Hugging Face folder, or hub id.")]
# JAX keeps 32 bits of a seed
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the draw.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print data instead of text.")]


def main() -> None:
    """Run the command; what a person can mend is one line on stderr and exit code 1."""
    from moejax.errors import MoejaxError

    # by default JAX leaves a quarter of a GPU's memory to others, and a model of 61 GB no room on 80
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    try:
        app()
    except (MoejaxError, OSError) as error:  # a full disk is nobody's bug either
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))  # names in files are anybody's
        Console(stderr=True, soft_wrap=True).print(f"moejax: {line}", style="red", markup=False, highlight=False)
        sys.exit(1)


@app.callback()
def _main() -> None:
    """Keeps subcommands named even while there is only one."""


@app.command()
def explain(
    prompt: Annotated[str, typer.Argument(help="Text to explain.")],
    model: Model = "tiny-olmoe",
    rule: Annotated[
        str, typer.Option(help="attnlrp, cplrp, gim, gamma, backtrace, plain; an unknown name lists all.")
    ] = "attnlrp",
    target: Annotated[
        str | None, typer.Option(help="Explain this token's logit instead of the most likely one's.")
    ] = None,
    contrast: Annotated[str | None, typer.Option(help="Explain TARGET minus this token (needs --target).")] = None,
    answer: Annotated[str | None, typer.Option(help="Explain every token of this continuation.")] = None,
    generate: Annotated[int, typer.Option(help="Explain each of this many generated tokens.")] = 0,
    as_json: AsJson = False,
    html: Annotated[Path | None, typer.Option(help="Also write a self-contained page.")] = None,
) -> None:
    """Show which tokens and experts caused the next token."""
    import moejax
    from moejax import report

    chosen = _target(target, contrast, answer, generate)
    if html is not None:
        _writable(html)
    relevance = moejax.explain(moejax.load(model), prompt, target=chosen, rule=rule)
    if html is not None:
        relevance.save_html(html)
    if as_json:
        print(json.dumps(relevance.to_dict()))
    else:
        report.render(relevance.to_dict())


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    model: Model = "tiny-olmoe",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k best tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the best tokens up to this probability.")] = 1.0,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Continue a text."""
    import moejax

    text = moejax.load(model).generate(
        prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    print(json.dumps({"prompt": prompt, "text": text}) if as_json else prompt + text)


Source = Annotated[str, typer.Argument(help="Hugging Face folder, hub id, or bundled name.")]
Written = Annotated[str, typer.Argument(help="A folder of either kind, hub id, or bundled name.")]
Destination = Annotated[Path, typer.Argument(help="Folder to make; it appears when it is complete.")]


@app.command()
def convert(
    source: Source,
    destination: Destination,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16, float32 or float64; default: as it is.")] = None,
    allow_nonfinite: Annotated[bool, typer.Option(help="Accept weights that are NaN or infinite.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a Hugging Face model as a folder of Orbax checkpoints; where a run was stopped, the next goes on."""
    import moejax

    _no_device()
    done = moejax.convert(source, destination, dtype=dtype, allow_nonfinite=allow_nonfinite, progress=_bar(as_json))
    print(json.dumps(done.to_dict()) if as_json else done)


@app.command()
def export(
    source: Written,
    destination: Destination,
    max_shard_bytes: Annotated[int, typer.Option(help="Most bytes of a file.")] = 5_000_000_000,
    as_json: AsJson = False,
) -> None:
    """Write a model as Hugging Face files."""
    import moejax

    _no_device()
    done = moejax.export(source, destination, max_shard_bytes=max_shard_bytes, progress=_bar(as_json))
    print(json.dumps(done.to_dict()) if as_json else done)


@app.command()
def verify(
    source: Written,
    dtype: Annotated[str, typer.Option(help="In which both compute; only float32 and float64 tell.")] = "float32",
    as_json: AsJson = False,
) -> None:
    """Compare logits with those of transformers; exit code 1 if they are not the same."""
    from moejax.checkpoints.verify import verify as compare
    from moejax.report.checkpoints import verification_table

    result = compare(source, dtype=dtype)
    if as_json:
        print(json.dumps(result.to_dict()))
    else:
        Console().print(verification_table(result.to_dict()))
    if result.passed is False:
        raise typer.Exit(1)


@app.command()
def doctor(
    model: Annotated[
        str | None, typer.Argument(help="Hub id, folder or bundled name; only its config is read.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights; default: float32 and bfloat16.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show versions and devices, and how much memory a model would take."""
    from moejax.checkpoints.doctor import examine
    from moejax.report.checkpoints import doctor_tables

    found = examine(model, dtype=dtype)
    if as_json:
        print(json.dumps(found))
    else:
        Console().print(*doctor_tables(found))


@app.command()
def analyse(
    model: Annotated[str, typer.Argument(help="Bundled name, hub id, or a folder of either kind.")],
    data: Annotated[
        Path,
        typer.Option(
            help="A prepared corpus (.npz, with its domains), .jsonl (a document a line: text, and label if it has"
            " one), text (one document), or 'sample', which is bundled."
        ),
    ],
    against: Annotated[str | None, typer.Option(help="Another checkpoint of the model, to compare with.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the table, the numbers and the plots.")] = Path("analysis"),
    length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a window; default: 512, or the model's context."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows at a time.")] = 8,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Draw windows up to so many tokens.")] = None,
    seed: Seed = 0,
    drop_top: Annotated[int, typer.Option(min=0, help="Also mask each token's best 1, 2, .. so many experts.")] = 0,
    probe_tokens: Annotated[int, typer.Option(min=1, help="Sample of the data for --drop-top.")] = 4096,
    by_token: Annotated[
        bool | None, typer.Option("--by-token/--no-by-token", help="Count by token id; default: where it fits.")
    ] = None,
    outputs: Annotated[
        bool,
        typer.Option("--outputs", help="Also how alike the outputs of a token's experts are; twice the work."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show how a model's routers use their experts on data, beside its loss."""
    import moejax
    from moejax import study
    from moejax.report.routing import routing_tables, write_routing

    _folder(out)
    lm = moejax.load(model)
    length = length or min(512, lm.config.max_positions)
    windows = study.Windows(study.Documents.read(data, lm), length, batch, max_tokens, seed)
    other = None if against is None else moejax.load(against)
    options = {"by_token": by_token, "outputs": outputs, "drop": drop_top, "probe_tokens": probe_tokens}
    found = study.analyse(lm, windows, against=other, **options, progress=_bar(as_json)).to_dict()
    written = write_routing(found, out)
    if as_json:
        print(json.dumps(found, allow_nan=False))
    else:
        Console().print(*routing_tables(found))
        print(f"{out}: {', '.join(path.name for path in written)}")


@app.command()
def train(
    config: Annotated[
        Path | None,
        typer.Option(help="JSON file with the fields of moejax.training.TrainConfig; default: small, on bundled text."),
    ] = None,
    moe_name: Annotated[
        str | None, typer.Option(help="Registered MoE layer, with its default settings; an unknown name lists all.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run; one that was stopped goes on.")] = Path("runs/train"),
    data: Annotated[str | None, typer.Option(help="Train on this .npz, .jsonl, text or 'sample' instead.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps instead.")] = None,
    plugin: Annotated[
        Path | None, typer.Option(help="Python file to run first: one that registers a layer of your own.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a small decoder on text; writes metrics, checkpoints, and a model that every other command takes."""
    from moejax.checkpoints.load import BUNDLED
    from moejax.report.training import follow
    from moejax.training import Run, TrainConfig

    if plugin is not None:
        runpy.run_path(str(plugin))
    settings = TrainConfig.read(config or BUNDLED / "sample.json", data=data, steps=steps)
    if data is not None:
        settings = replace(settings, heldout=None)
    run = Run(settings if moe_name is None else settings.with_moe(moe_name), out)
    if as_json:
        for row in run:
            print(json.dumps(row), flush=True)
    else:
        follow(run, settings.steps)
        Console().print(f"the trained model: {out / 'model'}", highlight=False)


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="Bundled name, folder or hub id; with --random a published shape.")],
    random: Annotated[
        bool, typer.Option("--random", help="Random weights of a published shape, on a CPU of a small one.")
    ] = False,
    tokens: Annotated[int, typer.Option(min=1, help="Of the prompt.")] = 512,
    long_tokens: Annotated[int, typer.Option(min=1, help="Of the long prompt.")] = 4096,
    cases: Annotated[str, typer.Option(help="Only cases of these names or words, with commas.")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="Calls to take the median of.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Time forward pass, relevance and decoding on this machine, beside what it could do at best."""
    from moejax.report.bench import heading_lines, row_line
    from moejax.study.bench import bench as measure

    name, decoder = _decoder(model, random)
    words = [word.strip() for word in cases.split(",")]
    # a row is printed as soon as it is measured, with --json as a line of its own
    for part in measure(name, decoder, tokens=tokens, long_tokens=long_tokens, cases=words, repeats=repeats):
        found = part if isinstance(part, dict) else part.to_dict()
        lines = (
            [json.dumps(found)]
            if as_json
            else heading_lines(part)
            if isinstance(part, dict)
            else [row_line(part.to_dict())]
        )
        print(*lines, sep="\n", flush=True)


def _decoder(model: str, random: bool) -> tuple[str, Any]:
    """Weights to time, and what they are called."""
    import jax

    import moejax
    from moejax.study.bench import published, random_decoder

    if not random:
        return model, moejax.load(model).decoder
    toy = jax.default_backend() == "cpu"
    return model + (", made small" if toy else "") + ", random", random_decoder(published(model, toy=toy))


def _no_device() -> None:
    """Keep to the host: files are rearranged, and an accelerator would be taken for nothing."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def _bar(as_json: bool) -> bool:
    return not as_json and sys.stderr.isatty()


def _target(target: str | None, contrast: str | None, answer: str | None, generate: int) -> Any:
    import moejax

    given = [name for name, value in [("--target", target), ("--answer", answer), ("--generate", generate)] if value]
    if len(given) > 1:
        raise moejax.PromptError(f"{' and '.join(given)} exclude each other.")
    if contrast is not None:
        if target is None:
            raise moejax.PromptError("--contrast needs --target: the token that it is set against.")
        return moejax.Contrast(target, contrast)
    if target is not None:
        return moejax.Token(target)
    if answer is not None:
        return moejax.Continuation(answer)
    return moejax.Generated(generate) if generate else moejax.Argmax()


def _writable(path: Path) -> None:
    from moejax import MoejaxError

    if path.is_dir() or not path.absolute().parent.is_dir():
        raise MoejaxError(f"cannot write {path}: its folder does not exist, or it is a folder itself.")


def _folder(path: Path) -> None:
    """Whether files can be written there, before hours are spent on what they should hold."""
    from moejax import MoejaxError

    nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise MoejaxError(f"cannot write into {path}: {nearest} is no folder, or not yours to write to.")
