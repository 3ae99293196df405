"""``moejax analyse`` and ``moejax bench``."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from moejax.cli.options import AsJson, Loading, Plugin, Seed, add, check_folder, shows_bar
from moejax.cli.output import one_object, say, say_json


def add_commands(app: typer.Typer) -> None:
    """Register the subcommands of this file."""
    add(app, analyse, bench)


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
        typer.Option(
            "--outputs", help="Also measure how alike the outputs of a token's experts are; takes twice the time."
        ),
    ] = False,
    as_json: AsJson = False,
    loading: Loading = Loading(),
    plugin: Plugin = None,
) -> None:
    """Show how a model's routers use their experts on data, beside its loss."""
    from moejax import study
    from moejax.report.routing import routing_tables, write_routing

    check_folder(out)
    lm = loading.load(model)
    length = length or min(512, lm.config.max_positions)
    loading.check_forward(lm.config, batch, length, lm.decoder.dtype.itemsize)
    windows = study.Windows(study.Documents.read(data, lm), length, batch, max_tokens, seed)
    other = None if against is None else loading.load(against)
    options = {"by_token": by_token, "outputs": outputs, "drop": drop_top, "probe_tokens": probe_tokens}
    statistics = study.analyse(lm, windows, against=other, **options, progress=shows_bar(as_json)).to_dict()
    written = write_routing(statistics, out)
    if as_json:
        say_json(statistics)
    else:
        console = Console()
        console.print(*routing_tables(statistics, console.width))
        say(f"{out}: {', '.join(path.name for path in written)}")


def bench(
    model: Annotated[str, typer.Argument(help="Bundled name, folder or hub id; with --random a published shape.")],
    random: Annotated[
        bool, typer.Option("--random", help="Random weights of a published shape, on a CPU of a small one.")
    ] = False,
    tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 512,
    long_tokens: Annotated[int, typer.Option(min=1, help="Length of the long prompt.")] = 4096,
    cases: Annotated[str, typer.Option(help="Only cases with these names or words, separated by commas.")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls; the median is shown.")] = 20,
    as_json: AsJson = False,
    loading: Loading = Loading(),
    plugin: Plugin = None,
) -> None:
    """Time forward pass, relevance and decoding on this machine, beside what it could do at best."""
    from moejax.report.bench import heading_lines, row_line
    from moejax.study.bench import bench as measure

    name, decoder = _decoder(model, random, loading)
    loading.check_forward(decoder.config, 1, max(tokens, long_tokens), decoder.dtype.itemsize)
    words = [word.strip() for word in cases.split(",")]
    # a row is printed as soon as it is measured, with --json as a line of its own
    for part in measure(name, decoder, tokens=tokens, long_tokens=long_tokens, cases=words, repeats=repeats):
        if isinstance(part, dict):
            lines = [one_object(part)] if as_json else heading_lines(part)
        else:
            row = part.to_dict()
            lines = [one_object(row) if as_json else row_line(row)]
        print(*lines, sep="\n", flush=True)


def _decoder(model: str, random: bool, loading: Loading) -> tuple[str, Any]:
    """The timed model's name and weights."""
    import jax

    from moejax import MoejaxError
    from moejax.study.bench import SHAPES, published, random_decoder

    if not random:
        shapes = [name for name in SHAPES if name.startswith(model.lower())]
        if shapes and not Path(model).exists():
            raise MoejaxError(f"{model!r} has no weights here; for its shape use: moejax bench {shapes[0]} --random")
        return model, loading.load(model).decoder
    if loading.dtype not in (None, "bfloat16"):
        raise MoejaxError("random weights are bfloat16; leave --dtype out.")
    toy = jax.default_backend() == "cpu"
    packed = loading.experts or ("mxfp4" if loading.keep_packed else "")
    config = published(model, toy=toy)
    config = config.pack(packed) if packed else config
    words = [model, "made small"] if toy else [model]
    return ", ".join([*words, "random", *([f"experts {packed}"] if packed else [])]), random_decoder(config)
