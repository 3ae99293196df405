"""``moejax explain`` and ``moejax generate``."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from moejax.cli.options import AsJson, Loading, Model, Plugin, Seed, add, check_file


def add_commands(app: typer.Typer) -> None:
    """Register the subcommands of this file."""
    add(app, explain, generate)


def explain(
    prompt: Annotated[str, typer.Argument(help="Text to explain.")],
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
    loading: Loading = Loading(),
    plugin: Plugin = None,
) -> None:
    """Show which tokens and experts caused the next token."""
    import moejax
    from moejax import report
    from moejax.relevance import BASELINES
    from moejax.report.scores import render_scores

    chosen = _target(target, contrast, answer, generate, ask)
    if (plot is None) != (out is None):
        raise moejax.MoejaxError("--plot and --out belong together: the plot's name, and the file to draw it into.")
    for path in (html, out):
        if path is not None:
            check_file(path)
    lm = loading.load(model)
    if baseline is not None:
        loading.check_forward(lm.config, 1, len(lm.encode(prompt)), lm.decoder.dtype.itemsize)
        scores = BASELINES.find(baseline)(lm, prompt, target=chosen).to_dict()
        print(json.dumps(scores)) if as_json else render_scores(scores)
        return
    bound = {} if loading.max_bytes is None else {"max_bytes": loading.max_bytes}
    relevance = moejax.explain(lm, prompt, target=chosen, rule=rule, **bound)
    if html is not None:
        relevance.save_html(html)
    data = relevance.to_dict()
    if plot is not None and out is not None:
        report.plot(plot, data).savefig(out, bbox_inches="tight")
    print(json.dumps(data)) if as_json else report.render(data)


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    model: Model = "tiny-olmoe",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest continuation.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k best tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the best tokens up to this probability.")] = 1.0,
    seed: Seed = 0,
    as_json: AsJson = False,
    loading: Loading = Loading(),
    plugin: Plugin = None,
) -> None:
    """Continue a text."""
    lm = loading.load(model)
    loading.check_forward(lm.config, 1, len(lm.encode(prompt)) + max_new_tokens, lm.decoder.dtype.itemsize)
    text = lm.generate(
        prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    print(json.dumps({"prompt": prompt, "text": text}) if as_json else prompt + text)


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
