"""Reports of made-up runs: figures against those written, unfinished and broken folders, one self-contained page."""

import json
import re
import statistics
from html.parser import HTMLParser

import pytest

from experiments.page import headline
from experiments.report import build_report, print_table
from experiments.results import ReportError, aggregate, churn, layer_density, load_runs
from experiments.tables import format_table
from tests.experiments.run_folders import DENSITIES, METHODS, write_runs


class Page(HTMLParser):
    """Collects a page's text and everything that it would load from elsewhere."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self, text):
        super().__init__()
        self.words, self.loads, self.open, self.ids = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        attributes = dict(attributes)
        self.loads += [v for k, v in attributes.items() if k in ("src", "href", "xlink:href") and v[:1] != "#"]
        self.ids += [attributes["id"]] if tag == "figure" else []

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def finished(tmp_path):
    return write_runs(tmp_path / "digits_dst")


def final_of(folder, method, seed):
    lines = (folder / method / f"seed{seed}" / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])


def test_rows_are_the_seeds_put_together(finished):
    rows = {row.method: row for row in aggregate(load_runs(finished))}
    assert list(rows) == ["dense", "gradual", "rigl", "set", "static"]
    for method, row in rows.items():
        finals = [final_of(finished, method, seed) for seed in range(3)]
        assert row.mean == pytest.approx(statistics.fmean(final["accuracy"] for final in finals))
        assert row.std == pytest.approx(statistics.stdev(final["accuracy"] for final in finals))
        assert (row.nnz, row.size, row.execution) == (finals[0]["nnz"], 50200, METHODS[method][2])
        assert row.inference_flops == pytest.approx(finals[0]["nnz"] / 50200)
        assert (row.finished, row.seeds, row.diverged) == (3, 3, 0)
    assert rows["rigl"].training_flops == pytest.approx(0.025)
    assert rows["rigl"].explored > rows["static"].explored == pytest.approx(0.02)


def test_lower_is_better_for_bits_per_byte(tmp_path):
    methods = {"set": (2.6, 0.3, "simulated"), "dense": (2.1, 0, "dense"), "rigl": (2.4, 0.2, "simulated")}
    rows = aggregate(load_runs(write_runs(tmp_path, methods, seeds=2, metric="bits_per_byte")))
    assert [row.method for row in rows] == ["dense", "rigl", "set"]
    assert "lower is better" in format_table(rows)
    assert re.search(r"best sparse method, rigl, .* bits per byte, 0\.\d+ worse than", headline(rows))


def test_the_terminal_table(finished, capsys):
    print_table(finished)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    for heading in ("accuracy", "sparsity", "nnz", "training FLOPs", "inference FLOPs", "execution"):
        assert heading in lines[0]
    assert re.fullmatch(r"rigl +95\.8\s±\s0\.6\s% +98\.00 % +1,004 +2\.5 % +2\.0 % +3\.6 % +simulated", lines[4])
    assert any(line.startswith("simulated: dense compute on zeros") for line in lines)


def test_the_report_is_written_whole(finished):
    page = build_report(finished)
    assert page == finished / "report.html"
    for name in ("accuracy", "mask_churn", "density"):
        assert (finished / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    results = json.loads((finished / "results.json").read_text())
    assert results["experiment"] == "digits_dst"
    assert (results["metric"], results["higher_is_better"]) == ("accuracy", True)
    assert [row["method"] for row in results["methods"]] == ["dense", "gradual", "rigl", "set", "static"]
    assert len(results["runs"]) == 15
    assert results["runs"][0]["final"] == final_of(finished, "dense", 0)


def test_the_page_is_self_contained_and_says_it_all(finished):
    source = build_report(finished).read_text()
    page = Page(source)
    assert page.ids == ["accuracy", "mask_churn", "density"]
    assert all(reference.startswith("data:") for reference in page.loads)
    assert not re.search(r"@import|url\((?!#)|<script", source)
    assert "prefers-color-scheme: dark" in source
    for text in ("digits_dst", "5 methods · 3 seeds each · 1,200 steps", "How to read this", "learning_rate", "98.00 %",
                 "test accuracy (%)", "layers/2/kernel", "What tells the methods apart"):  # fmt: skip
        assert text in page.text
    for method in METHODS:
        assert page.text.count(method) >= 2
    assert "Not finished" not in page.text
    assert re.search(r"best sparse method, gradual, kept 1,004 of 50,200 prunable weights \(2 %\)", page.text)


def test_equal_runs_make_an_equal_page(finished):
    assert build_report(finished).read_text() == build_report(finished).read_text()


def test_unfinished_runs_are_reported_as_such(tmp_path):
    unfinished = [("rigl", 2), ("set", 0), ("set", 1), ("set", 2)]
    folder = write_runs(tmp_path, unfinished=unfinished)
    # The process was killed while it wrote a line.
    with (folder / "rigl" / "seed2" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "eval", "step": 7')
    (folder / "set" / "seed1" / "metrics.jsonl").unlink()
    rows = {row.method: row for row in aggregate(load_runs(folder))}
    assert (rows["rigl"].finished, rows["rigl"].seeds) == (2, 3)
    assert (rows["set"].finished, rows["set"].mean, list(rows)[-1]) == (0, None, "set")
    assert "NOT FINISHED: rigl, 2 of 3 seeds have ended" in format_table(list(rows.values()))
    text = Page(build_report(folder).read_text()).text
    assert "Not finished: rigl seed 2 (step 600), set seed 0 (step 600), set seed 1 (step 0)" in text


def test_a_run_that_has_only_begun_makes_a_page_without_plots(tmp_path):
    folder = write_runs(tmp_path, {"dense": METHODS["dense"]}, seeds=1)
    (folder / "dense" / "seed0" / "metrics.jsonl").write_text("")
    page = Page(build_report(folder).read_text())
    assert page.ids == []
    assert "No sparse method has ended yet." in page.text


def test_a_resumed_run_counts_its_repeated_steps_once(tmp_path):
    folder = write_runs(tmp_path, {"rigl": METHODS["rigl"]}, seeds=1)
    path = folder / "rigl" / "seed0" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:15] + lines[6:]) + "\n")
    [run] = load_runs(folder)
    assert run.curve("eval", lambda r: r["accuracy"])[0] == list(range(0, 1201, 100))


def test_diverged_seeds_are_named_and_json_stays_strict(tmp_path):
    folder = write_runs(tmp_path, {"rigl": METHODS["rigl"]})
    path = folder / "rigl" / "seed1" / "metrics.jsonl"
    path.write_text(re.sub(r'"accuracy": [^,}]+', '"accuracy": NaN', path.read_text()))
    [row] = aggregate(load_runs(folder))
    assert (row.finished, row.diverged) == (3, 1)
    assert "DIVERGED: rigl, 1 of 3 seeds" in format_table([row])
    assert "Diverged: rigl (1 of 3 seeds)" in Page(build_report(folder).read_text()).text
    results = json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["runs"][1]["final"]["accuracy"] is None


def test_a_final_record_with_fewer_figures_leaves_cells_empty(tmp_path):
    folder = write_runs(tmp_path, {"rigl": METHODS["rigl"]}, seeds=1)
    path = folder / "rigl" / "seed0" / "metrics.jsonl"
    *rest, _ = path.read_text().splitlines()
    path.write_text("\n".join([*rest, '{"kind": "final", "step": 1200, "accuracy": 0.9}']))
    [row] = aggregate(load_runs(folder))
    assert (row.mean, row.std, row.nnz, row.training_flops, row.execution) == (0.9, None, None, None, "-")
    build_report(folder)


def test_churn_and_density_of_records():
    layers = {
        "a": {"nnz": 4, "size": 10, "added": 1, "dropped": 3},
        "b": {"nnz": 2, "size": 10, "added": 0, "dropped": 0},
    }
    assert churn({"step": 10, "layers": layers}) == 3 / 8
    assert churn({"step": 0, "layers": layers}) is None
    assert churn({"step": 10, "layers": {"a": {"nnz": 4, "size": 10, "added": 4, "dropped": 0}}}) is None


def test_density_is_that_of_the_last_masks(finished):
    runs = [run for run in load_runs(finished) if run.method == "set"]
    assert layer_density(runs) == pytest.approx(DENSITIES)


def test_names_are_escaped(tmp_path):
    folder = write_runs(tmp_path, {"<b>&": METHODS["rigl"], "dense": METHODS["dense"]}, seeds=1)
    assert "<b>&" in Page(build_report(folder).read_text()).text


def test_many_layers_make_a_heat_map(tmp_path):
    layers = {f"blocks/{i}/{part}/kernel": 4096 for i in range(4) for part in ("attention/query", "mlp/up", "mlp/down")}
    folder = write_runs(tmp_path, seeds=1, layers=layers)
    assert "blocks/3/mlp/down/kernel" in Page(build_report(folder).read_text()).text


def test_wrong_folders_are_named_with_the_remedy(tmp_path, finished):
    with pytest.raises(ReportError, match="nowhere is not a folder"):
        load_runs(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReportError, match=r"holds no runs.*python -m experiments run NAME"):
        build_report(tmp_path / "empty")
    with pytest.raises(ReportError, match=r"single run, the experiment is .*digits_dst$"):
        build_report(finished / "rigl" / "seed0")
    with pytest.raises(ReportError, match=r"single method, the experiment is .*digits_dst$"):
        build_report(finished / "rigl")
    with pytest.raises(ReportError, match=r"name one of the experiments inside, digits_dst$"):
        build_report(tmp_path)


def test_broken_files_are_named(finished):
    metrics = finished / "rigl" / "seed1" / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join([lines[0], "{broken", *lines[1:]]))
    with pytest.raises(ReportError, match=r"seed1/metrics\.jsonl, line 2 is no record"):
        load_runs(finished)
    metrics.write_text("\n".join(lines))
    (finished / "rigl" / "seed1" / "config.json").write_text("[]")
    with pytest.raises(ReportError, match=r"seed1/config\.json is no run's configuration"):
        load_runs(finished)


def test_experiments_of_different_measures_do_not_mix(tmp_path):
    write_runs(tmp_path, {"a": METHODS["rigl"]}, seeds=1)
    write_runs(tmp_path, {"b": METHODS["rigl"]}, seeds=1, metric="bits_per_byte")
    with pytest.raises(ReportError, match="accuracy and bits_per_byte"):
        build_report(tmp_path)
