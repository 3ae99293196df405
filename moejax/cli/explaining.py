"""``moejax explain`` and ``moejax generate``."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from moejax.cli.options import AsJson, Loading, Model, Plugin, Seed, add, check_file
from moejax.cli.output import say, say_json
from moejax.cli.prompts import Prompts


def add_commands(app: typer.Typer) -> None:
    """Register the subcommands of this file."""
    add(app, explain, generate)


def explain(
    prompts: Prompts = Prompts(),
    model: Model = "tiny-olmoe",
    rule: Annotated[str, typer.Option(help="Rule by which relevance propagates: {RULES}.")] = "attnlrp",
    baseline: Annotated[
        str | None, typer.Option(help="Score by another method instead of relevance: {BASELINES}.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Explain this token's logit instead of the most likely token's.")
    ] = None,
    contrast: Annotated[str | None, typer.Option(help="Explain TARGET minus this token (needs --target).")] = None,
    answer: Annotated[str | None, typer.Option(help="Explain every token of this continuation.")] = None,
    generate: Annotated[int, typer.Option(help="Explain each of this many generated tokens.")] = 0,
    ask: Annotated[
        str | None,
        typer.Option(
            help="Explain a target by its name and fields, as 'router_choice layer=3 expert=1 versus=2': {TARGETS}."
        ),
    ] = None,
    as_json: AsJson = False,
    html: Annotated[Path | None, typer.Option(help="Also write a self-contained page.")] = None,
    plot: Annotated[str | None, typer.Option(help="Also draw this plot (needs --out): {PLOTS}.")] = None,
    out: Annotated[Path | None, typer.Option(help="File for the plot: .png, .svg or .pdf.")] = None,
    all_tokens: Annotated[
        bool, typer.Option("--all-tokens", help="Of a --chat, also show the tokens of the template.")
    ] = False,
    loading: Loading = Loading(),
    plugin: Plugin = None,
) -> None:
    """Show which tokens and experts caused the next token; with --json one document a line, of all tokens."""
    import moejax
    from moejax.relevance import BASELINES

    chosen = _target(target, contrast, answer, generate, ask)
    if (plot is None) != (out is None):
        raise moejax.MoejaxError("--plot and --out belong together: the plot's name, and the file to draw it into.")
    for option, path in (("--html", html), ("--out", out)):
        if path is not None:
            check_file(path)
            if prompts.are_several:
                raise moejax.MoejaxError(f"{option} takes one prompt: it names one file.")
    asked = prompts.read()
    lm = loading.load(model)
    bound = {} if loading.max_bytes is None else {"max_bytes": loading.max_bytes}
    for number, prompt in enumerate(asked):
        if number and not as_json:
            print()
        if baseline is not None:
            loading.check_forward(lm.config, 1, len(lm.encode(prompt)), lm.decoder.dtype.itemsize)
            _show_scores(BASELINES.find(baseline)(lm, prompt, target=chosen).to_dict(), as_json)
        else:
            _show(moejax.explain(lm, prompt, target=chosen, rule=rule, **bound), as_json, html, (plot, out), all_tokens)


def _show_scores(scores: Any, as_json: bool) -> None:
    """Print what a method says."""
    from moejax.report.scores import render_scores

    say_json(scores) if as_json else render_scores(scores)


def _show(
    relevance: Any, as_json: bool, html: Path | None, plot: tuple[str | None, Path | None], all_tokens: bool
) -> None:
    """Print an explanation and write its pictures; these leave out a chat's template unless all tokens are wanted."""
    from moejax import report

    pictured = relevance.aggregate("template") if relevance.roles and not all_tokens else relevance
    if html is not None:
        pictured.save_html(html)
    name, out = plot
    if name is not None and out is not None:
        report.save_figure(report.plot(name, pictured.to_dict()), out, bbox_inches="tight")
    say_json(relevance.to_dict()) if as_json else report.render(pictured.to_dict())


def generate(
    prompts: Prompts = Prompts(),
    model: Model = "tiny-olmoe",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest continuation.")] = 64,
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw, with the model's own temperature, top-k and top-p unless given.")
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(help="0, the default without --sample, takes the best token.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k best tokens; 0 keeps all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the best tokens up to this probability.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="End at this text; may be given several times.")
    ] = None,
    stream: Annotated[
        bool | None, typer.Option("--stream/--no-stream", help="Show each word at once; default: on a terminal.")
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
    loading: Loading = Loading(),
    plugin: Plugin = None,
) -> None:
    """Continue texts, or answer a chat; with --json one document a line."""
    asked = prompts.read()
    streams = not as_json and (sys.stdout.isatty() if stream is None else stream)
    options = {
        "max_new_tokens": max_new_tokens,
        "do_sample": sample or None,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "stop_strings": stop or None,
        "seed": seed,
    }
    lm = loading.load(model)
    for number, prompt in enumerate(asked):
        loading.check_forward(lm.config, 1, len(lm.encode(prompt)) + max_new_tokens, lm.decoder.dtype.itemsize)
        if number and not as_json:
            print()
        # of a chat the answer alone: its messages are no text that goes on
        shown = prompt if isinstance(prompt, str) else ""
        if as_json:
            about = {"prompt": prompt} if isinstance(prompt, str) else {"messages": list(prompt.messages)}
            say_json(about | {"text": lm.generate(prompt, **options)})
        elif streams:
            _stream(lm, prompt, shown, options)
        else:
            say(shown, lm.generate(prompt, **options))


def _stream(lm: Any, prompt: Any, shown: str, options: dict[str, Any]) -> None:
    """Print a text, and what follows it as soon as it is there."""
    waiting = [shown]

    def tell(piece: str) -> None:
        # the prompt comes with the first piece, so that no word about compiling stands between them
        say(*(waiting and [waiting.pop()]), piece, end="")

    lm.generate(prompt, streamer=tell, **options)
    say(*waiting)


def _target(target: str | None, contrast: str | None, answer: str | None, generate: int, ask: str | None) -> Any:
    """The target that the options name; the most likely next token by default."""
    import moejax
    from moejax.relevance.targets import parse_target

    options = {"--target": target, "--answer": answer, "--generate": generate, "--ask": ask}
    given = [name for name, value in options.items() if value]
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
    if ask is not None:
        return parse_target(ask)
    return moejax.Generated(generate) if generate else moejax.Argmax()
