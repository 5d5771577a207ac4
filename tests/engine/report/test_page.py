"""The report: what it says of runs, finished or not, and what it refuses."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.report_runs import ODD, RECIPE, RESULTS, four_runs, gammas, metrics, widths, write_run

from polarfast.engine.report import write_report
from polarfast.engine.report.axes import Markup, tag
from polarfast.errors import ArgumentError

VOID = {"br", "hr", "img", "input", "link", "meta"}


class Page(HTMLParser):
    """Elements that are closed in order, and what is in them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def report(*runs: Path) -> Page:
    out = write_report(runs, runs[0].parent / "report.html")
    return Page(out.read_text(encoding="utf-8"))


@pytest.fixture
def four(tmp_path: Path) -> list[Path]:
    return four_runs(tmp_path)


def test_one_run_is_told_in_full(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "first"))
    for part in (
        "93.50 %", "93.25 %", "−0.25 points", "93.75 %", "+0.25 points",
        "125 → 66.0 M", "−47.2 %", "850 → 500 k", "−41.2 %", "3.40 → 2.10 MB",
        "4.00 → 5.00 ms", "1.25× slower", "80.0 → 50.0 ms", "1.60× faster", "1 h 06 min",
        "resnet56, cifar10", "Some CPU, 2 threads", "3e-12", "test set", "lam: 0.0001",
        "17.0 → 11.2 dense epochs", "first: the γ of every layer are equal",
    ):  # fmt: skip
        assert part in page.text, part
    headings = ["Results", "Training", "γ over the epochs", "γ of each layer", "Channels kept"]
    for heading in [*headings, "Latency", "Settings", "How each figure was measured"]:
        assert heading in page.words
    assert "finished" in page.words and "Unfinished" not in page.text


def test_every_layer_is_there_with_what_is_kept(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run", layers=9))
    for name, width in widths(9).items():
        stay = width - width // 3
        assert page.words.count(name.removesuffix(".weight")) == 2  # histogram and table
        assert f"{stay} of {width} kept, threshold 0.25" in page.words
        assert f"{stay} of {width}" in page.words


def test_page_is_accessible_and_asks_for_nothing(four: list[Path]) -> None:
    page = report(*four)
    assert page.all("html") == [{"lang": "en"}] and len(page.all("h1")) == 1
    assert page.all("title") and page.all("main")
    tables = page.all("table")
    assert len(page.all("caption")) == len(tables) >= 3
    assert all(attributes["scope"] in ("col", "row") for attributes in page.all("th"))
    images = page.all("svg")
    assert all("aria-label" in i or i.get("aria-hidden") == "true" for i in images)
    labels = {attributes["for"] for attributes in page.all("label")}
    assert {attributes["id"] for attributes in page.all("input")} == labels != set()
    identifiers = [a["id"] for _, a in page.elements if "id" in a]
    assert len(identifiers) == len(set(identifiers))
    addresses = [a[key] for _, a in page.elements for key in ("src", "href") if key in a]
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert "url(" not in (four[0].parent / "report.html").read_text().replace("url(#clip-", "")


def test_odd_names_are_text(four: list[Path]) -> None:
    page = report(*four)
    assert ODD in page.words and not page.all("img")
    only = report(four[1])
    assert f"polarfast: {ODD}" in only.words and not only.all("img")


def test_settings_that_differ_and_no_others(four: list[Path]) -> None:
    page = report(*four[:2])
    start = page.words.index("Setting")
    table = page.words[start : page.words.index("Recipe of plain, in full")]
    assert table[3:] == ["sparsity.lam", "0.0001", "0.0003", "sparsity.t", "1.2", ODD]
    assert "The 4 other settings are the same in all runs." in page.text
    same = report(four[0], four[2])
    assert "All 6 settings are the same in all runs." in same.text


def test_settings_are_written_plainly(tmp_path: Path) -> None:
    settings = {"a": None, "b": True, "c": "", "d": {}, "e": {"f": [1, 2]}}
    runs = [
        write_run(tmp_path / "one", recipe={**RECIPE, **settings}),
        write_run(tmp_path / "two", recipe={**RECIPE, **dict.fromkeys("abcde", 7)}),
    ]
    words = report(*runs).words
    shown = [words[words.index(name) + 1] for name in ("a", "b", "c", "d", "e.f")]
    assert shown == ["none", "yes", "empty", "empty", "[1, 2]"]


def test_unfinished_runs_say_how_far_they_are(four: list[Path], tmp_path: Path) -> None:
    page = report(*four)
    assert "Unfinished: fine-tuning, epoch 2 of 6" in page.words
    assert "Unfinished: sparsity training, epoch 3 of 12" in page.words
    assert "pruned is unfinished; not written yet: results." in page.text
    assert "early is unfinished; not written yet: pruning plan, results." in page.text
    # The pruned one has a plan already.
    assert page.text.count("125 → 66.0 M") == 3
    nothing = write_run(tmp_path / "just begun", done=0)
    (nothing / "metrics.jsonl").unlink()
    page = report(nothing)
    assert "Unfinished: no epoch is done" in page.words and "Training" not in page.words
    # A line that is being written is left for the next report.
    with (four[3] / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"stage": "spar')
    assert "Unfinished: sparsity training, epoch 3 of 12" in report(four[3]).words


def test_a_run_without_scaling_factors_or_dense_network(tmp_path: Path) -> None:
    run = write_run(tmp_path / "uniform")
    (run / "gammas.pt").unlink()
    values = RESULTS.to_dict() | {"accuracy_dense": None}
    (run / "results.json").write_text(json.dumps(values), encoding="utf-8")
    page = report(run)
    assert "no dense network was trained" in page.words
    assert "γ of each layer" not in page.words and "Channels kept" in page.words


def test_a_diverged_run_has_gaps(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    lines = [line | {"loss": None if line["index"] == 5 else 1.0} for line in metrics(12, 6, 18)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text, encoding="utf-8")
    (chart,) = charts(report(run), "Training loss")
    assert chart["lines"][0][2].count(None) == 1
    path = next(a["d"] for a in lines_of(report(run)) if a["d"] is not None)
    assert path.count("M") == 2


def charts(page: Page, title: str) -> list[dict]:
    return [
        json.loads(a["data-chart"] or "")
        for a in page.all("svg")
        if "data-chart" in a and (a["aria-label"] or "").startswith(title)
    ]


def lines_of(page: Page) -> list[dict[str, str | None]]:
    """Curves, without the samples of the legends."""
    return [a for a in page.all("path") if a.get("class") == "line" and a["d"] != "M1,7H33"]


@pytest.mark.parametrize(("title", "key", "factor", "digits"), [
    ("Training loss", "loss", 1, 4), ("MACs cut", "cut", 100, 3), ("Learning rate", "lr", 1, 4),
])  # fmt: skip
def test_curves_run_through_the_numbers(
    tmp_path: Path, title: str, key: str, factor: float, digits: int
) -> None:
    page = report(write_run(tmp_path / "run", train=40, finetune=10))
    (chart,) = charts(page, title)
    expected = [line[key] * factor for line in metrics(40, 10, 50) if key in line]
    name, first, values = chart["lines"][0]
    assert (name, first) == ("run", 1)
    assert values == pytest.approx(expected, rel=1e-2)
    # The first six panels have one line each, in this order.
    order = ["loss", "accuracy", "cut", "at_zero", "lr", "images_per_second"]
    path = lines_of(page)[order.index(key)]["d"] or ""
    points = [tuple(map(float, p.split(","))) for p in re.split("[ML]", path)[1:]]
    low, high, left, right = chart["x"]
    epochs = [low + (x - left) / (right - left) * (high - low) for x, _ in points]
    assert epochs == pytest.approx(range(1, len(expected) + 1), abs=0.01)
    heights = torch.tensor([y for _, y in points])
    order_of_values = torch.tensor(expected).argsort(stable=True, descending=True)
    assert heights[order_of_values].diff().min() >= -0.011  # larger values are not lower


@pytest.mark.slow
def test_long_runs_stay_small(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"r{i}", train=200, finetune=200, layers=55) for i in range(4)]
    one = write_report(runs[:1], tmp_path / "one.html")
    many = write_report(runs, tmp_path / "many.html")
    assert one.stat().st_size < 400_000 and many.stat().st_size < 2_000_000


def test_names_are_as_long_as_they_must_be(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, done=2) for name in ("a/seed0", "b/seed0", "b/seed1")]
    cards = [w for w in report(*runs).words if w in ("a/seed0", "b/seed0", "seed0", "seed1")]
    assert set(cards) == {"a/seed0", "b/seed0", "seed1"}


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "run"), tmp_path / "new" / "report.html"
    (tmp_path / "empty").mkdir()
    for runs, message in (
        ([], "name at least one"),
        ([run, tmp_path / "empty"], "empty': no folder of a run, recipe.yaml is missing"),
        ([tmp_path / "absent"], "absent': there is no such folder"),
        ([run, run.parent / "empty" / ".." / "run"], "given twice"),
    ):
        with pytest.raises(ArgumentError, match=message):
            write_report(runs, out)
    with pytest.raises(ArgumentError, match="is a folder"):
        write_report([run], tmp_path)
    assert not out.parent.exists()
    assert write_report([run], out) == out and out.is_file()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def break_line(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([lines[0], '{"loss": 1}', *lines[2:], ""]), encoding="utf-8")


def other_layers(path: Path) -> None:
    torch.save(gammas({name: 8 for name in widths(6)}, 12), path)


def fewer_layers(path: Path) -> None:
    values = gammas(widths(6), 12)
    torch.save({**values, "names": values["names"][1:]}, path)


@pytest.mark.parametrize(("name", "damage", "message"), [
    ("recipe.yaml", lambda path: path.write_text("a: ["), "not valid YAML: line 1"),
    ("metrics.jsonl", break_line, "metrics.jsonl', line 2: no epoch of a run"),
    ("gammas.pt", truncate, "gammas.pt' is damaged or no file of polarfast's"),
    ("gammas.pt", lambda path: torch.save({"names": []}, path), "gammas.pt' holds no history"),
    ("gammas.pt", fewer_layers, "counts have shape [12, 6, 100], not [epochs, 5, 100]"),
    ("gammas.pt", other_layers, "does not fit gammas.pt at 'layer1.0.bn1.weight'"),
    ("plan.json", truncate, "plan.json': this is not a pruning plan"),
    ("results.json", truncate, "results.json"),
    ("results.json", lambda path: path.write_text("{}", encoding="utf-8"), "not the results"),
])  # fmt: skip
def test_damaged_files_are_named_and_the_rest_is_shown(
    tmp_path: Path, name: str, damage, message: str
) -> None:
    run = write_run(tmp_path / "run")
    damage(run / name)
    page = report(run)
    assert message in page.text and "run: " in page.words
    assert ("93.75 %" in page.text) == (name != "results.json")
    assert ("γ of each layer" in page.words) == (name != "gammas.pt")
    assert "Channels kept" in page.words or name == "plan.json"
    assert "Unfinished" not in page.text


@pytest.mark.slow
@given(st.text())
def test_text_is_escaped_and_markup_is_not(text: str) -> None:
    page = Page(tag("p", text, tag("b", text), title=text))
    assert page.all("p")[0]["title"] == text
    assert tag("p", Markup("<i></i>")) == "<p><i></i></p>"
    assert [name for name, _ in page.elements] == ["p", "b"]
