"""Pictures; matplotlib is imported here and nowhere else."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .report import _block

if TYPE_CHECKING:
    from .compare_methods import MethodResult, MethodsTable
    from .report import LayerError, Report, ReportBase
    from .sensitivity import Sensitivity

__all__ = ["methods_figure", "report_figure", "sensitivity_figure"]

# Okabe and Ito's palette, readable with every colour vision; the three attention inputs share a hue.
_COLOURS = {
    "query": "#0072b2",
    "key": "#56b4e9",
    "value": "#a6d8f0",
    "attention in": "#0072b2",
    "attention out": "#009e73",
    "feed-forward in": "#e69f00",
    "feed-forward out": "#d55e00",
    "other": "#999999",
}
_INK = "#333333"
_MODES = {"weights": ("#0072b2", "o"), "activations": ("#e69f00", "s"), "both": ("#333333", "D")}
_SCHEMES = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#999999")


class _Figure(Figure):
    """A figure that Jupyter shows without pyplot, hence without global state and never twice."""

    def _repr_png_(self) -> bytes:
        data = io.BytesIO()
        self.savefig(data, format="png", dpi=100)
        return data.getvalue()


def report_figure(report: ReportBase) -> Figure:
    """Bars of the output signal-to-noise of every layer, in the network's order, and a histogram: of the cosines, or of a
    language model's divergences.

    The small dash on a bar is the signal-to-noise of the layer's weights. A layer without error has no bar and no dash.
    """
    width = min(max(9.0, 5.0 + 0.11 * len(_drawn(report))), 24.0)
    figure = _Figure(figsize=(width, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(width - 3.4, 3.4))
    _bars(left, report)
    _divergences(right, report) if hasattr(report, "kl") else _histogram(right, report)  # type: ignore[arg-type]
    _legend(figure, report)
    figure.suptitle(_title(report), fontsize=11, color=_INK, x=0.01, ha="left")
    return figure


def _legend(figure: Figure, report: ReportBase) -> None:
    kinds = [kind for kind in _COLOURS if any(x.kind == kind for x in _drawn(report))]
    figure.legend(
        handles=[Patch(color=_COLOURS[kind], label=kind) for kind in kinds],
        ncols=len(kinds),
        fontsize=8,
        frameon=False,
        loc="outside lower left",
        handlelength=1.0,
        handleheight=1.0,
        columnspacing=1.2,
        handletextpad=0.5,
    )


def _title(report: ReportBase) -> str:
    return f"{report.scheme}: {', '.join(report.headline)}"


def _drawn(report: ReportBase) -> tuple[LayerError, ...]:
    """The layers that ran."""
    return tuple(x for x in report.layers if x.output_db is not None)


def _bare(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=_INK, labelsize=8.5)
    axes.set_axisbelow(True)


def _positions(layers: tuple[LayerError, ...]) -> list[float]:
    """One step per layer, a gap of one between blocks."""
    at, gap = [], 0
    for i, layer in enumerate(layers):
        gap += i > 0 and layer.block != layers[i - 1].block
        at.append(float(i + gap))
    return at


def _bars(axes: Any, report: ReportBase) -> None:
    layers = _drawn(report)
    at = _positions(layers)
    heights = {i: x.output_db for i, x in enumerate(layers) if x.output_db is not None and math.isfinite(x.output_db)}
    colours = [_COLOURS[layers[i].kind] for i in heights]
    axes.bar([at[i] for i in heights], list(heights.values()), width=0.84, color=colours)
    dashes = [i for i, x in enumerate(layers) if math.isfinite(x.weight_db)]
    axes.scatter(
        [at[i] for i in dashes], [layers[i].weight_db for i in dashes], marker="_", s=26, color=_INK, linewidths=1.4
    )
    _block_ticks(axes, layers, at)
    axes.set_ylabel("signal to quantization noise (dB)", color=_INK, fontsize=9)
    axes.set_title("Linear layers: output (bar) and weights (dash)", fontsize=9.5, color=_INK, loc="left")
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.margins(x=0.012)
    _bare(axes)


def _block_ticks(axes: Any, layers: tuple[LayerError, ...], at: list[float]) -> None:
    groups: dict[int | None, list[float]] = {}
    for layer, position in zip(layers, at):
        groups.setdefault(layer.block, []).append(position)
    axes.set_xticks([sum(p) / len(p) for p in groups.values()], ["head" if b is None else str(b) for b in groups])
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("block", color=_INK, fontsize=9)


def _histogram(axes: Any, report: Report) -> None:
    cosine = report.cosine
    low = float(cosine.min())
    axes.hist(
        cosine,
        bins=min(40, max(8, len(cosine) // 8)),
        range=(low, max(1.0, low + 1e-6)),
        color="#56b4e9",
        edgecolor="white",
        linewidth=0.5,
    )
    axes.axvline(report.mean_cosine, color=_INK, linewidth=1.2)
    axes.text(
        0.04,
        0.97,
        f"mean {report.mean_cosine:.4f}\nmin  {report.min_cosine:.4f}",
        transform=axes.transAxes,
        va="top",
        fontsize=8.5,
        color=_INK,
        family="monospace",
    )
    axes.set_title("Cosine to float32", fontsize=9.5, color=_INK, loc="left")
    axes.set_ylabel(report.rows, color=_INK, fontsize=9)
    axes.locator_params(axis="x", nbins=4)
    _bare(axes)


def _divergences(axes: Any, report: Any) -> None:
    """Kullback-Leibler divergences of single tokens, on a logarithmic axis; what rounds to nothing is at its left end."""
    floor = 1e-9
    kl = np.maximum(report.kl, floor)
    low = max(floor, float(np.quantile(kl, 0.001)))
    high = max(float(kl.max()), low * 10)
    axes.hist(
        np.maximum(kl, low),
        bins=np.geomspace(low, high, min(40, max(8, len(kl) // 8))),
        color="#56b4e9",
        edgecolor="white",
        linewidth=0.5,
    )
    axes.set_xscale("log")
    axes.axvline(max(report.mean_kl, low), color=_INK, linewidth=1.2)
    axes.text(
        0.04,
        0.97,
        f"mean {report.mean_kl:.2g}\nmax  {report.kl.max():.2g}",
        transform=axes.transAxes,
        va="top",
        fontsize=8.5,
        color=_INK,
        family="monospace",
    )
    axes.set_title("KL divergence to float32 (nats)", fontsize=9.5, color=_INK, loc="left")
    axes.set_ylabel("tokens", color=_INK, fontsize=9)
    _bare(axes)


# --- studies of several quantized models -----------------------------------------------------------------------------


def _increase_axis(axes: Any, values: list[float], axis: str) -> None:
    """Increases of a loss: linear up to their median, logarithmic beyond where they span more than a factor of 30."""
    found = sorted(abs(v) for v in values if v and math.isfinite(v))
    if found and found[-1] > 30 * found[len(found) // 2]:
        getattr(axes, f"set_{axis}scale")("symlog", linthresh=found[len(found) // 2])
    draw = axes.axhline if axis == "y" else axes.axvline
    draw(0, color=_INK, linewidth=0.8)
    axes.grid(axis=axis, color="#dddddd", linewidth=0.7)


def _class_lines(axes: Any, study: Sensitivity) -> None:
    """The borders of ZeroQuant-V2's classes, where they are in sight."""
    if study.metric != "perplexity":
        return
    for border, text in ((0.1, "class 1 below"), (0.5, "class 3 above")):
        if axes.get_ylim()[0] < border < axes.get_ylim()[1]:
            axes.axhline(border, color="#888888", linewidth=0.8, linestyle="--")
            axes.text(1.0, border, text, transform=axes.get_yaxis_transform(), fontsize=7.5, color="#666666", ha="right",
                      va="bottom")


def sensitivity_figure(study: Sensitivity) -> Figure:
    """Three panels: the increase by layer in the network's order, by kind of layer, and by block size of the weights."""
    layers = study.increases("layer", "weights")
    width = min(max(4.0, 2.0 + 0.09 * len(layers)), 14.0)
    figure = _Figure(figsize=(width + 7.6, 4.4), layout="constrained")
    first, second, third = figure.subplots(1, 3, width_ratios=(width, 4.2, 3.4))
    _by_name(first, study, "layer", "Each linear layer alone")
    blocks = [_block(name) for name in layers]
    starts = [i for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1]]
    first.set_xticks(starts, ["" if blocks[i] is None else str(blocks[i]) for i in starts])
    first.set_xlabel("block", color=_INK, fontsize=9)
    _by_name(second, study, "kind", "Each kind of layer alone")
    kinds = list(study.increases("kind", "weights"))
    second.set_xticks(range(len(kinds)), kinds, rotation=40, ha="right")
    _by_block_size(third, study)
    first.set_ylabel(f"{study.metric}: worse than float32 by", color=_INK, fontsize=9)
    handles, labels = first.get_legend_handles_labels()
    if not handles:
        handles, labels = second.get_legend_handles_labels()
    figure.legend(handles, labels, ncols=3, fontsize=8.5, frameon=False, loc="outside lower left")
    title = f"{study.scheme} by {study.method}, {study.metric} {study.loss.text(study.reference)} in float32"
    figure.suptitle(title, fontsize=11, color=_INK, x=0.01, ha="left")
    return figure


def _by_name(axes: Any, study: Sensitivity, part: str, title: str) -> None:
    everything: list[float] = []
    for offset, (mode, (colour, marker)) in zip((-0.2, 0.0, 0.2), _MODES.items()):
        values = list(study.increases(part, mode).values())
        everything += values
        if values:
            at = [i + offset for i in range(len(values))]
            axes.plot(at, values, marker, color=colour, markersize=4.2, label=mode, fillstyle="none" if offset > 0 else "full")
    _increase_axis(axes, everything, "y")
    _class_lines(axes, study)
    axes.set_title(title, fontsize=9.5, color=_INK, loc="left")
    _bare(axes)


def _by_block_size(axes: Any, study: Sensitivity) -> None:
    values = [b.increase for b in study.blocks]
    axes.plot(range(len(values)), values, "o-", color=_MODES["weights"][0], markersize=4.5)
    axes.set_xticks(range(len(values)), ["row" if b.size is None else str(b.size) for b in study.blocks], rotation=40)
    _increase_axis(axes, values, "y")
    _class_lines(axes, study)
    axes.set_xlabel("inputs per scale", color=_INK, fontsize=9)
    axes.set_title("All weights, by block size", fontsize=9.5, color=_INK, loc="left")
    _bare(axes)


def methods_figure(table: MethodsTable) -> Figure:
    """A line per recipe, grouped and coloured by scheme: the increase of the loss. A recipe that failed has a note."""
    schemes = list(dict.fromkeys(result.scheme for result in table.results))
    found = [r for scheme in schemes for r in table.results if r.scheme == scheme]
    rows: list[tuple[float, MethodResult]] = [(i + 0.7 * schemes.index(r.scheme), r) for i, r in enumerate(found)]
    figure = _Figure(figsize=(9.0, 1.6 + 0.3 * max(len(rows), 3) + 0.2 * len(schemes)), layout="constrained")
    axes = figure.subplots()
    drawn = [(at, r, r.increase) for at, r in rows if r.increase is not None and math.isfinite(r.increase)]
    colours = {scheme: _SCHEMES[i % len(_SCHEMES)] for i, scheme in enumerate(schemes)}
    for at, r, x in drawn:
        axes.plot([0, x], [at, at], color=colours[r.scheme], linewidth=1.5, alpha=0.6)
        axes.plot([x], [at], "o", color=colours[r.scheme], markersize=7)
    _increase_axis(axes, [x for _, _, x in drawn], "x")
    for at, r in rows:
        note = "failed" if r.value is None else table.loss.text(r.value)
        note += "" if r.recovered is None else f"  ({100 * r.recovered:.0f} % of RTN's loss regained)"
        axes.annotate(note, (max(r.increase or 0.0, 0.0), at), xytext=(7, 0), textcoords="offset points", va="center",
                      fontsize=8, color=_INK)
    axes.set_yticks([at for at, _ in rows], [r.name for _, r in rows])
    axes.invert_yaxis()
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * 6 if axes.get_xscale() == "symlog" else high + 0.35 * (high - low))  # room for the notes
    axes.set_xlabel(f"{table.metric}: worse than float32 ({table.loss.text(table.reference)}) by", color=_INK, fontsize=9)
    figure.legend(handles=[Patch(color=colours[scheme], label=scheme) for scheme in schemes], fontsize=8.5, frameon=False,
                  ncols=min(len(schemes), 6), loc="outside lower left")
    _bare(axes)
    return figure
