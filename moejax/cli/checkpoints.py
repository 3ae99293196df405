"""``moejax convert``, ``export``, ``verify``, ``doctor`` and ``models``."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moejax.cli.options import AsJson, Loading, Plugin, add, shows_bar, use_host_only
from moejax.cli.output import say, say_json
from moejax.compilation_cache import SETTING, keep_programs

Source = Annotated[str, typer.Argument(help="Hugging Face folder, hub id, or bundled name.")]
AnySource = Annotated[str, typer.Argument(help="Hugging Face folder, converted folder, hub id, or bundled name.")]
Destination = Annotated[Path, typer.Argument(help="Folder to make; it appears when it is complete.")]


def add_commands(app: typer.Typer) -> None:
    """Register the subcommands of this file."""
    add(app, convert, export, verify, doctor, models)


def convert(
    source: Source,
    destination: Destination,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16, float32 or float64; by default the source's.")
    ] = None,
    allow_nonfinite: Annotated[bool, typer.Option(help="Accept weights that are NaN or infinite.")] = False,
    as_json: AsJson = False,
    plugin: Plugin = None,
) -> None:
    """Write a Hugging Face model as a folder of Orbax checkpoints; a run that was stopped is continued."""
    import moejax

    use_host_only()
    bar = shows_bar(as_json)
    try:
        done = moejax.convert(source, destination, dtype=dtype, allow_nonfinite=allow_nonfinite, progress=bar)
    except KeyboardInterrupt:
        print("stopped; the same command goes on with what is left", file=sys.stderr)
        raise typer.Exit(130) from None
    say_json(done.to_dict()) if as_json else say(done)


def export(
    source: AnySource,
    destination: Destination,
    max_shard_bytes: Annotated[int, typer.Option(help="Most bytes of a file.")] = 5_000_000_000,
    experts: Annotated[
        str | None, typer.Option(help="int8: round the experts' weights first, as load does (needs --dequantise).")
    ] = None,
    dequantise: Annotated[bool, typer.Option("--dequantise", help="Write experts that were rounded in full.")] = False,
    as_json: AsJson = False,
    plugin: Plugin = None,
) -> None:
    """Write a model as Hugging Face files."""
    import moejax

    use_host_only()
    model = source if experts is None else Loading(experts=experts).load(source)
    options = {"max_shard_bytes": max_shard_bytes, "dequantise": dequantise, "progress": shows_bar(as_json)}
    done = moejax.export(model, destination, **options)
    say_json(done.to_dict()) if as_json else say(done)


def verify(
    source: AnySource,
    as_json: AsJson = False,
    loading: Loading = Loading(),
    plugin: Plugin = None,
) -> None:
    """Compare logits with transformers' logits; exit code 1 if they differ.

    Both compute in float32 unless --dtype says otherwise; only float32 and float64 can tell. Of rounded experts, it is
    shown how far they are from the original.
    """
    from moejax.checkpoints.convert import parse_dtype
    from moejax.checkpoints.describe import architecture
    from moejax.checkpoints.verify import verify as compare
    from moejax.report.checkpoints import verification_table

    options = {"keep_packed": loading.keep_packed, "experts": loading.experts}
    batch, length, dtype = 2, 48, loading.dtype or "float32"
    loading.check_forward(architecture(source), batch, length, parse_dtype(dtype).itemsize)
    result = compare(source, dtype=dtype, **options, batch=batch, length=length)
    if as_json:
        say_json(result.to_dict())
    else:
        Console().print(verification_table(result.to_dict()))
    if result.passed is False:
        raise typer.Exit(1)


def doctor(
    model: Annotated[
        str | None, typer.Argument(help="Hub id, folder or bundled name; only its config is read.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Dtype of the weights; by default float32 and bfloat16 are shown.")
    ] = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            help="Say what fits this GPU, and how: t4, l4, a100-40, h100, .., or the one that is here; may be given "
            "several times."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt, for --gpu.")] = 512,
    targets: Annotated[int, typer.Option(min=1, help="Targets of the explanation, for --gpu.")] = 16,
    new_tokens: Annotated[int, typer.Option(min=1, help="Generated tokens, for --gpu.")] = 256,
    as_json: AsJson = False,
    plugin: Plugin = None,
) -> None:
    """Show versions and devices, how much memory a model would take, and what fits a GPU."""
    from moejax import MoejaxError
    from moejax.checkpoints.doctor import examine
    from moejax.report.checkpoints import doctor_tables
    from moejax.report.fit import fit_table
    from moejax.study.fit import Work, fit

    if gpu and model is None:
        raise MoejaxError("--gpu says whether a model fits; name the model.")
    work = Work(tokens, targets, new_tokens)
    fits = [fit(model, name, dtype=dtype, work=work) for name in gpu or []]
    facts, folder = examine(model, dtype=dtype), keep_programs()
    if as_json:
        kept = {"compilation_cache": None if folder is None else str(folder)}
        say_json(dict(facts) | kept | ({"fit": fits} if fits else {}))
    else:
        # of a GPU that is asked for, the answer alone
        Console().print(*(map(fit_table, fits) if fits else doctor_tables(facts)))
        if not fits:
            off = f"nowhere (turned off, or the folder cannot be written; {SETTING}=off turns it off)"
            say(f"compiled programs are kept in: {off if folder is None else folder}")


def models(as_json: AsJson = False, plugin: Plugin = None) -> None:
    """List the bundled models, the families whose models load, and the shapes that can be timed."""
    from moejax.checkpoints.folder import bundled_names
    from moejax.models import FAMILIES
    from moejax.study.bench import SHAPES

    found = {"bundled": bundled_names(), "families": sorted(FAMILIES), "shapes": sorted(SHAPES)}
    if as_json:
        say_json(found)
        return
    print(f"bundled, by name: {', '.join(found['bundled'])}")
    print(f"families (model_type of a folder or hub id): {', '.join(found['families'])}")
    print(f"shapes of `moejax bench --random`: {', '.join(found['shapes'])}")
