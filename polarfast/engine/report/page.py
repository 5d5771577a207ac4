"""The page: reads the runs, puts tables and figures in order, writes one file."""

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

import polarfast as pf

from ...errors import ArgumentError
from ..folder import write_text
from . import bars, curves, gammas, tables
from .axes import Look, Markup, join, tag
from .reading import RunRecord, read_runs

# Nothing is fetched from anywhere, whatever the page holds.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write one HTML page about some runs, side by side.

    The page needs no other file and no network: tables, figures and a small script are in it.
    An unfinished run is shown as far as it is, a damaged one as far as it can be read.

    Args:
        runs: folders that ``polarfast run`` wrote, finished or not.
        out: the page; its folder is made if it is not there.

    Returns:
        ``out``.

    Raises:
        ArgumentError: no runs, a run given twice, a folder that is no run, or ``out`` is a folder.
    """
    out = Path(out)
    if out.is_dir():
        raise ArgumentError(f"out='{out}' is a folder: name a file, e.g. '{out / 'report.html'}'")
    page = render(read_runs(runs))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page)
    return out


def render(runs: Sequence[RunRecord]) -> str:
    """The whole page."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    sections = _sections(runs)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", f"polarfast: {title}"),
        tag("style", _asset("page.css")),
    )
    links = (tag("a", section[1], href=f"#{section[0]}") for section in sections)
    body = tag(
        "body",
        tag("header", tag("p", "polarfast report"), tag("h1", title), _cards(runs)),
        tag("nav", *links, aria_label="Sections"),
        tag("main", (_section(*section) for section in sections)),
        tag("footer", f"Written by polarfast {pf.__version__}."),
        tag("script", _asset("page.js")),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _sections(runs: Sequence[RunRecord]) -> list[tuple[str, str, Markup]]:
    """(anchor, heading, content), of what there is."""
    samples = [Look(index).sample() for index in range(len(runs))]
    legend = _legend(runs, samples)
    told = join(_unread(runs), _missing(runs), _remarks(runs))
    found = [("results", "Results", join(told, tables.results(runs)))]
    if any(run.epochs for run in runs):
        panels = _grid(curves.training_curves(runs))
        found.append(("training", "Training", join(legend, _stages_key(runs), panels)))
    if any(run.gammas for run in runs):
        over_time, at_end = gammas.over_time(runs, samples), gammas.at_the_end(runs, samples)
        # Of a single run the two stand side by side.
        grids = (
            _grid(join(over_time, at_end))
            if len(runs) == 1
            else join(_grid(over_time), _grid(at_end))
        )
        found.append(("gammas", "γ over the epochs", grids))
        layers = join(_layers_key(runs), gammas.per_layer(runs, samples))
        found.append(("layers", "γ of each layer", layers))
    if any(run.plan for run in runs):
        details = tag(
            "details",
            tag("summary", "All layers as a table"),
            bars.channels_table(runs),
            class_="block",
        )
        panels = _grid(bars.channels_kept(runs, samples))
        found.append(("channels", "Channels kept", join(panels, details)))
    if any(run.results and run.results.latency_ms for run in runs):
        found.append(("latency", "Latency", _grid(bars.latency(runs))))
    found.append(("settings", "Settings", tables.settings(runs)))
    found.append(("method", "How each figure was measured", _method(runs)))
    return found


def _section(anchor: str, heading: str, content: Markup) -> Markup:
    return tag("section", tag("h2", heading, id=f"h-{anchor}"), content, id=anchor,
               aria_labelledby=f"h-{anchor}")  # fmt: skip


def _grid(panels: Markup) -> Markup:
    return tag("div", panels, class_="grid")


def _cards(runs: Sequence[RunRecord]) -> Markup:
    """What a reader wants to know first of each run."""
    cards = []
    for index, run in enumerate(runs):
        facts = []
        if (macs := tables.sizes_of(run, "macs")) is not None:
            facts.append((tables.cut(macs), "MACs"))
        if (results := run.results) is not None:
            dense, name = results.accuracy_dense, "accuracy"
            if dense is not None:
                name += f", {tables.points(results.accuracy_finetuned - dense)}"
            facts.append((f"{results.accuracy_finetuned:.2f} %", name))
        elif accuracy := run.series("accuracy"):
            facts.append((f"{accuracy[-1][1]:.2f} %", f"accuracy at epoch {accuracy[-1][0]}"))
        state = tag("p", f"Unfinished: {run.unfinished}", class_="state") if run.unfinished else ""
        values = (tag("div", tag("dd", value), tag("dt", name)) for value, name in facts)
        name = tag("p", Look(index).sample(), run.name, class_="run")
        cards.append(tag("li", name, state, tag("dl", values) if facts else ""))
    return tag("ul", cards, class_="cards")


def _legend(runs: Sequence[RunRecord], samples: Sequence[Markup]) -> Markup:
    if len(runs) == 1:
        return Markup()
    names = (tag("li", sample, run.name) for run, sample in zip(runs, samples, strict=True))
    return tag("ul", names, class_="legend", aria_label="Runs")


def _missing(runs: Sequence[RunRecord]) -> Markup:
    """What the page cannot show of unfinished runs."""
    notes = []
    for run in runs:
        kinds = (("γ histograms", run.gammas), ("pruning plan", run.plan), ("results", run.results))
        lacking = [name for name, content in kinds if content is None]
        if run.unfinished:
            notes.append(tag("p", f"{run.name} is unfinished; not written yet: ",
                             f"{', '.join(lacking)}."))  # fmt: skip
    return join(notes)


def _unread(runs: Sequence[RunRecord]) -> Markup:
    """What is there and cannot be read."""
    told = [(run.name, why) for run in runs for why in run.unread]
    return join(tag("p", tag("strong", f"{name}: "), why) for name, why in told)


def _remarks(runs: Sequence[RunRecord]) -> Markup:
    """What a plan says should be known before it is used."""
    told = [(run.name, remark) for run in runs if run.plan for remark in run.plan.remarks]
    return join(tag("p", tag("strong", f"{name}: "), remark) for name, remark in told)


def _stages_key(runs: Sequence[RunRecord]) -> Markup:
    later = list(dict.fromkeys(stage for run in runs for stage, _ in run.stages[1:]))
    if not later:
        return Markup()
    text = f"Dotted vertical line: where {' or '.join(later)} begins"
    return tag("p", text + (", with the run's marker above." if len(runs) > 1 else "."))


def _layers_key(runs: Sequence[RunRecord]) -> Markup:
    text = (
        "One histogram for each layer, γ from 0 to 1, heights on a square-root scale and relative "
        "to the layer's highest bar."
    )
    if any(run.plan for run in runs):
        text += " Filled: channels that stay. Outlined: removed. Dashed line: the threshold."
    return tag("p", text)


def _method(runs: Sequence[RunRecord]) -> Markup:
    """One paragraph for each kind of number on the page."""
    terms = [
        ("Accuracy", _accuracy_method(runs)),
        ("MACs", "Multiply-accumulates of all convolutions and linear layers for one image, "
         "counted on the models themselves. The share predicted during training is that of a "
         "plan made from γ as they stood after the epoch."),
        ("γ at 0", "Share of the scaling factors of magnitude below 0.01."),
        ("Model file", "Bytes on disk: the dense model's weights, and the saved slim model."),
        ("Latency", _latency_method(runs)),
        ("MACs of the whole training", "Epochs that were trained, fine-tuning included, and what "
         "their passes cost in epochs of the dense network: channels at 0 are taken out while "
         "training goes on."),
        ("Speed", "Training images divided by the time of the epoch, evaluation not included."),
    ]  # fmt: skip
    errors = [
        f"{run.name}: {run.results.verified_error:.0e}" for run in runs if run.results is not None
    ]
    if errors:
        terms.append(
            ("Pruning alone", "Right after pruning, the slim model was compared in float64 with "
             "the dense model whose removed channels have γ = 0. Largest relative difference of "
             f"the outputs: {'; '.join(errors)}.")
        )  # fmt: skip
    return tag("dl", (join(tag("dt", name), tag("dd", text)) for name, text in terms),
               class_="method")  # fmt: skip


def _accuracy_method(runs: Sequence[RunRecord]) -> str:
    held = []
    for run in runs:
        data = run.recipe.get("data")
        share = data.get("validation", 0) if isinstance(data, Mapping) else 0
        if isinstance(share, float) and share:
            held.append(f"{run.name} ({100 * share:g} %)")
    text = "Share of images, not trained on, whose most likely class is the right one. "
    if not held:
        return text + "These are the images of the test set."
    whose = "" if len(held) == len(runs) else "; of the other runs: the test set"
    return f"{text}Images held out of the training set for {', '.join(held)}{whose}."


def _latency_method(runs: Sequence[RunRecord]) -> str:
    text = (
        "Median time of forward passes in eval mode, the dense and the slim model taking turns, "
        "after warm-up. "
    )
    places = {}
    for run in runs:
        if run.results is not None:
            places[run.name] = run.results.measured_on
    if len(set(places.values())) == 1:
        text += f"Measured on: {next(iter(places.values()))}. "
    elif places:
        text += "; ".join(f"{name}: {place}" for name, place in places.items()) + ". "
    return text + (
        "Milliseconds compare only between runs measured on the same idle machine; the ratio of "
        "dense to slim compares more widely."
    )


def _asset(name: str) -> Markup:
    return Markup((resources.files(__package__) / name).read_text(encoding="utf-8"))
