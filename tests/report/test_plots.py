"""Plots are found by name and draw what they were given; a file outside of the package can add one."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_reports import HOSTILE, E, H, L, T, brute_force_map, make_report
from matplotlib.figure import Figure

from moejax import MoejaxError, report
from moejax.errors import ConfigError
from moejax.report.plots import PLOTS, plot, register_plot
from moejax.report.plots.routing import routing_figures
from moejax.report.schema import LayerEntry, RelevanceReport

RELEVANCE = ("overview", "tokens", "experts", "heads", "layers", "matrix")
ROUTING = ("utilisation", "router", "coactivation", "layer_overlap", "labels", "changes")


def make_routing(layers: int = L, kind: str = "feed_forward") -> dict[str, Any]:
    """Routing statistics of random usages, with every field that a plot reads."""
    rng = np.random.default_rng(0)
    numbers = ("router_entropy", "weight_entropy", "router_margin", "weight_margin", "usage_entropy")
    rows = []
    for layer in range(layers):
        used = rng.dirichlet(np.ones(E))
        row: dict[str, Any] = dict.fromkeys(LayerEntry.__annotations__)
        row |= {"layer": layer, "experts": E, "slots": 2, "tokens": 50, "nan_tokens": 0}
        row |= {name: float(rng.uniform()) for name in numbers}
        row |= {"utilisation": used.tolist(), "coactivation": rng.uniform(size=(E, E)).tolist()}
        row |= {"label_divergence": 0.1 * (layer + 1), "token_specialisation": 0.2}
        row |= {"label_usage": rng.dirichlet(np.ones(E), 3).tolist()}
        rows.append(row)
    overlap = {"layer_overlap": rng.uniform(size=(layers, layers)).tolist(), "random_overlap": 0.2}
    changes = [{"layer": i, "tokens": 50, "overlap": 0.7, "switch_rate": 0.3} for i in range(layers)]
    return {
        "schema": 1,
        "model": "tiny-olmoe",
        "labels": ["code", "prose $x^$", "\x1b[31m"],
        "mixtures": {kind: {"layers": rows} | overlap},
        "against": "an earlier one",
        "changes": {kind: changes},
    }


def shown(drawing: Any, panel: int = 0) -> np.ndarray:
    return np.asarray(drawing.axes[panel].images[0].get_array())


def test_every_plot_is_found_by_name() -> None:
    assert set(PLOTS) >= {*RELEVANCE, *ROUTING}
    assert report.plot is plot
    assert PLOTS["overview"] is report.figure


@pytest.mark.parametrize("name", RELEVANCE)
@pytest.mark.parametrize(("target", "scale"), [(0, "linear"), (2, "sqrt")])
def test_plots_of_relevance(name: str, target: int, scale: str) -> None:
    data = make_report(tokens=HOSTILE) | {"prompt_length": 9}
    drawing = report.plot(name, data, target, scale=scale)
    drawing.savefig(io.BytesIO())
    assert isinstance(drawing, Figure)
    title = data["model"] if name == "matrix" else data["targets"][target]["label"].strip("'")
    assert title in drawing.get_suptitle()


def test_square_root_colours() -> None:
    data = make_report()
    norm = plot("experts", data, 1, scale="sqrt").axes[0].images[0].norm
    largest = np.abs(brute_force_map(data, 1)).max()
    np.testing.assert_allclose(
        norm([-largest, -largest / 4, 0, largest / 4, largest]), [0, 0.25, 0.5, 0.75, 1], atol=1e-12
    )
    assert plot("tokens", data, 1, scale="sqrt").axes[0].get_yscale() == "function"
    with pytest.raises(MoejaxError, match="scale='log' is unknown; choose from linear, sqrt"):
        plot("layers", data, scale="log")


def test_the_matrix_has_all_targets_and_nothing_behind_them() -> None:
    data = make_report()
    values = plot("matrix", data).axes[0].images[0].get_array()
    for row, target in zip(np.ma.filled(values, np.nan), data["targets"], strict=True):
        end = target["position"] + 1
        np.testing.assert_allclose(row[:end], target["tokens"][:end])
        assert np.isnan(row[end:]).all()


def test_panels_have_the_numbers() -> None:
    data = make_report()
    chosen = data["targets"][1]
    bars = [patch.get_height() for patch in plot("tokens", data, 1).axes[0].patches]  # type: ignore[attr-defined]
    np.testing.assert_allclose(bars, chosen["tokens"])
    np.testing.assert_allclose(shown(plot("experts", data, 1)), brute_force_map(data, 1))
    np.testing.assert_allclose(shown(plot("heads", data, 1)), np.sum(chosen["heads"], axis=1))
    np.testing.assert_allclose(shown(plot("layers", data, 1)), chosen["layers"])
    assert shown(plot("heads", data)).shape == (L, H)
    assert shown(plot("layers", data)).shape == (L + 1, T)


def test_a_dense_model_has_heads_but_no_experts() -> None:
    data = make_report(targets=1)
    data["num_experts"] = 0
    for key in ("expert_ids", "expert_weights"):
        data[key] = np.zeros((L, T, 0), int).tolist()
    data["targets"][0]["experts"] = np.zeros((L, T, 0)).tolist()
    with pytest.raises(MoejaxError, match="tiny-olmoe has no experts to plot; plot 'heads' or 'layers'"):
        plot("experts", data)
    np.testing.assert_array_equal(shown(plot("overview", data), 1), shown(plot("heads", data)))


@pytest.mark.parametrize("name", ROUTING)
@pytest.mark.parametrize("kind", ["feed_forward", "attention"])
def test_plots_of_routing(name: str, kind: str) -> None:
    drawing = report.plot(name, make_routing(kind=kind), kind=kind)
    drawing.savefig(io.BytesIO())
    assert drawing.get_suptitle().startswith("tiny-olmoe: ")


def test_figures_of_routing_are_the_plots_with_data() -> None:
    data = make_routing()
    assert list(routing_figures(data)) == list(ROUTING)
    assert [*routing_figures(make_routing(kind="attention"))] == [f"attention_{name}" for name in ROUTING]
    data["changes"] = None
    assert "changes" not in routing_figures(data)
    with pytest.raises(MoejaxError, match="no 'changes' of kind 'feed_forward' to plot; there is util"):
        plot("changes", data)
    with pytest.raises(MoejaxError, match="choose from the kinds feed_forward"):
        plot("router", data, kind="attention")


def test_a_plot_from_outside() -> None:
    @register_plot("a test's own")
    def signs(data: RelevanceReport, target: int = 0, shift: float = 0.0) -> Figure:
        drawing = Figure()
        drawing.subplots().plot(np.sign(data["targets"][target]["tokens"]) + shift)
        return drawing

    data = make_report()
    drawing = report.plot("a test's own", data, 1, shift=2.0)
    drawn = drawing.axes[0].lines[0].get_ydata()
    np.testing.assert_array_equal(drawn, np.sign(data["targets"][1]["tokens"]) + 2)
    with pytest.raises(ConfigError, match="a plot 'tokens' is registered already"):
        register_plot("tokens")(signs)


def test_an_unknown_name_lists_all() -> None:
    with pytest.raises(MoejaxError, match=r"plot 'pie' is unknown; choose from .*overview.*experts"):
        report.plot("pie", make_report())


def test_looking_for_plots_leaves_matplotlib_alone() -> None:
    code = """
import sys
from moejax import report
assert {"overview", "utilisation"} <= set(report.PLOTS)
assert "matplotlib" not in sys.modules
"""
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
