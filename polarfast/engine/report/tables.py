"""Tables of the page: results, and settings in which runs differ."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..results import Pair
from ..yamls import to_yaml_text
from .axes import Look, Markup, join, tag
from .reading import RunRecord

NONE = "—"
ARROW = " → "


def results(runs: Sequence[RunRecord]) -> Markup:
    """One quantity a row, one run a column."""
    rows: list[tuple[str, Callable[[RunRecord], Markup | str]]] = [
        ("State", _state),
        ("Model, data", _what),
        ("Accuracy after sparsity training", _accuracy("accuracy_dense")),
        ("Accuracy right after pruning", _accuracy("accuracy_pruned")),
        ("Accuracy, fine-tuned", _accuracy("accuracy_finetuned")),
        ("MACs of one image", lambda run: _sizes(run, "macs")),
        ("Parameters", lambda run: _sizes(run, "params")),
        ("Size of the model file", lambda run: _sizes(run, "file_bytes", "B")),
    ]
    for batch in sorted({b for run in runs if run.results for b in run.results.latency_ms}):
        rows.append((f"Latency, batch of {batch}", _latency(batch)))
    rows += [("MACs of the whole training", _training), ("Training time", _time)]
    body = [tag("tr", tag("th", name, scope="row"), (_cell(show(run)) for run in runs))
            for name, show in rows]  # fmt: skip
    caption = "Dense model → slim model. Changes are against the dense model of the same run."
    return table("Results", caption, _head("", runs), body)


def settings(runs: Sequence[RunRecord]) -> Markup:
    """What differs between the recipes, and each recipe in full."""
    flat = [_flatten(run.recipe) for run in runs]
    names = list(dict.fromkeys(name for values in flat for name in values))
    differing = [n for n in names if len({repr(values.get(n, NONE)) for values in flat}) > 1]
    parts: list[Markup] = []
    if differing:
        body = [
            tag("tr", tag("th", name, scope="row"),
                (_cell(_setting(values.get(name, NONE))) for values in flat))
            for name in differing
        ]  # fmt: skip
        caption = f"The {len(names) - len(differing)} other settings are the same in all runs."
        parts.append(table("Settings that differ", caption, _head("Setting", runs), body))
    elif len(runs) > 1:
        parts.append(tag("p", f"All {len(names)} settings are the same in all runs."))
    for index, run in enumerate(runs):
        text = to_yaml_text(run.recipe)
        summary = tag("summary", Look(index).sample(), f"Recipe of {run.name}, in full")
        pre = tag("pre", text, tabindex=0, aria_label=f"Recipe of {run.name}")
        parts.append(tag("details", summary, pre, class_="block"))
    return join(parts)


def table(
    name: str, caption: str, head: Markup, body: Sequence[Markup], class_: str | None = None
) -> Markup:
    """A table that scrolls in its own box where it is wider than the page."""
    title = tag("caption", tag("span", caption))
    inner = tag("table", title, tag("thead", head), tag("tbody", body), class_=class_)
    return tag("div", inner, class_="scroll", tabindex=0, role="group", aria_label=name)


def sizes_of(run: RunRecord, name: str) -> Pair | None:
    """MACs, parameters or bytes; an unfinished run that has a plan knows the first two."""
    if run.results is not None:
        pair: Pair = getattr(run.results, name)
        return pair
    if run.plan is None or name == "file_bytes":
        return None
    return Pair(getattr(run.plan, f"{name}_before"), getattr(run.plan, name))


def significant(value: float, digits: int = 3) -> str:
    """To some significant digits, zeros at the end included."""
    text = f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:#.{digits}g}"
    return text.removesuffix(".")


def cut(pair: Pair) -> str:
    """The change from dense to slim, in percent."""
    return _signed(-100 * pair.cut, 1) + " %"


def points(change: float) -> str:
    """A difference of accuracies."""
    return f"{_signed(change, 2)} points"


def _signed(value: float, digits: int) -> str:
    """With a sign, a true minus among them, and none before a zero."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else text[1:]


def _head(first: str, runs: Sequence[RunRecord]) -> Markup:
    names = (tag("th", Look(i).sample(), r.name, scope="col") for i, r in enumerate(runs))
    return tag("tr", tag("th", first, scope="col") if first else tag("td"), names)


def _cell(content: Markup | str) -> Markup:
    # Only words may wrap; numbers stay with their units.
    return tag("td", content, class_="wrap" if not isinstance(content, Markup) else None)


def _with_change(main: str, change: str) -> Markup:
    return join(main, tag("small", change))


def _state(run: RunRecord) -> str:
    return "finished" if run.unfinished is None else f"unfinished: {run.unfinished}"


def _what(run: RunRecord) -> str:
    data = run.recipe.get("data", NONE)
    name = data.get("name", NONE) if isinstance(data, Mapping) else data
    return f"{run.recipe.get('model', NONE)}, {name}"


def _accuracy(name: str) -> Callable[[RunRecord], Markup | str]:
    def show(run: RunRecord) -> Markup | str:
        if run.results is None:
            return NONE
        value, dense = getattr(run.results, name), run.results.accuracy_dense
        if value is None:
            return "no dense network was trained"
        text = f"{value:.2f} %"
        if name == "accuracy_dense" or dense is None:
            return text
        return _with_change(text, points(value - dense))

    return show


def _sizes(run: RunRecord, name: str, unit: str = "") -> Markup | str:
    pair = sizes_of(run, name)
    if pair is None:
        return NONE
    power = next((p for p in (9, 6, 3) if pair.dense >= 10**p), 0)
    letter = {9: "G", 6: "M", 3: "k", 0: ""}[power]
    dense, slim = (significant(v / 10**power) for v in (pair.dense, pair.slim))
    return _with_change(f"{dense}{ARROW}{slim} {letter}{unit}".strip(), cut(pair))


def _latency(batch: int) -> Callable[[RunRecord], Markup | str]:
    def show(run: RunRecord) -> Markup | str:
        pair = run.results.latency_ms.get(batch) if run.results is not None else None
        if pair is None:
            return NONE
        text = f"{significant(pair.dense)}{ARROW}{significant(pair.slim)} ms"
        return _with_change(text, pair.faster)

    return show


def _training(run: RunRecord) -> Markup | str:
    if run.results is None:
        return NONE
    epochs = run.results.epochs
    text = f"{significant(epochs.dense)}{ARROW}{significant(epochs.slim)} dense epochs"
    return _with_change(text, cut(epochs))


def _time(run: RunRecord) -> str:
    seconds = run.results.seconds if run.results else sum(v for _, v in run.series("seconds"))
    hours, rest = divmod(round(seconds), 3600)
    so_far = "" if run.results else " so far"
    if hours:
        return f"{hours} h {rest // 60:02d} min{so_far}"
    return (f"{rest // 60} min {rest % 60:02d} s" if rest >= 60 else f"{rest} s") + so_far


def _setting(value: Any) -> str:
    """As a recipe writes it, in one line."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return str(value) if value not in ("", {}) else "empty"


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
