"""`dit report` draws what runs' folders hold, in one file that needs nothing else."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from noted import note
from omegaconf import OmegaConf

from dit.command import report
from dit.command.compose import ConfigError, compose, jobs, launch
from dit.data.image import encode_png
from dit.weights.card import brief

EULER = {"_target_": "dit.sampler.ancestral.sample", "_partial_": True, "eta": 0.0, "variance": "small"}


@pytest.fixture
def runs(tmp_path):
    """Folders of two runs, with what training leaves."""

    def make(name, steps, *overrides, pictures=(), **summary):
        folder = tmp_path / "runs" / name
        (folder / "samples").mkdir(parents=True)
        OmegaConf.save(compose("train", ["experiment=digits", *overrides]), folder / "config.yaml", resolve=True)
        with (folder / "metrics.jsonl").open("w") as file:
            for step in steps:
                line = {"step": step, "images": 32 * step, "loss": 1 / step if step != 20 else None, "lr": 1e-3}
                file.write(json.dumps({**line, "grad_norm": 1.0, "images_per_second": 900.0}) + "\n")
                if step % 30 == 0:
                    file.write(json.dumps({"step": step, "fid": 100 / step}) + "\n")
            file.write('{"step": 1000, "lo')  # cut
        for step in pictures:
            picture = torch.full((1, 8, 16), step % 256, dtype=torch.uint8)
            (folder / "samples" / f"step-{step:08d}.png").write_bytes(encode_png(picture))
        if summary:
            (folder / "summary.json").write_text(json.dumps(summary))
        return name

    return make


@pytest.fixture
def judged(tmp_path):
    """Appends an evaluation to a run."""

    def append(run, fid, number, step=8, **more):
        inception = {"name": "inception", "sha256": "1a" * 32, "resize": "to 299"}
        settings = {"run": run, "step": step, "extractors": {"fid": inception}, "num_samples": number}
        settings |= {"guidance": {"scale": 1.0}, "sampler": {"num_steps": 4, **EULER}, **more}
        note(tmp_path / "runs" / run, {"fid": fid}, **settings)

    return append


def drawn(tmp_path, run, *overrides):
    words = [f"run={run}", f"runs_dir={tmp_path}/runs", f"out={tmp_path}/report.html", *overrides]
    quoted = [re.sub(r"^(run|out)=([^\[].*)", r'\1="\2"', word) for word in words]
    cfg = compose("report", jobs(quoted)[0])
    report.check(cfg)
    assert report.main(cfg) == 0
    return Path(cfg.out)


def test_one_file_holds_the_curves_grids_and_figures_of_several_runs(tmp_path, runs, capsys):
    runs("digits", range(10, 100, 10), pictures=range(10, 100, 10), step=90, accuracy=0.98765)
    page = drawn(tmp_path, "digits").read_text()
    assert page.count("data:image/png;base64,") == 1 + 4 and "0.9877" in page
    assert [int(step) for step in re.findall(r"<figcaption>step (\d+)", page)] == [20, 40, 70, 90]
    assert not re.findall(r'(?:src|href)="(?!data:)', page)  # nothing from elsewhere
    assert "digits at step 90" in capsys.readouterr().out


def test_what_runs_have_otherwise_stands_side_by_side(tmp_path, runs):
    runs("digits", range(10, 100, 10), pictures=[90], step=90, goodput=0.5)
    runs("other", range(10, 50, 10), "optimizer.lr=0.5")
    page = drawn(tmp_path, "digits,other").read_text()
    assert re.search(r"<td>optimizer.lr</td><td>0.00\d+</td><td>0.5</td>", page)
    assert "<td>optimizer.betas</td>" not in page and "<td>goodput</td><td>0.5</td><td>-</td>" in page
    assert "Samples of digits" in page and "Samples of other" not in page


def test_evaluations_that_were_not_made_alike_stand_in_tables_of_their_own(tmp_path, runs, judged):
    for name in ("one", "two"):
        runs(name, [10, 20])
    judged("one", 2.25, 50000)
    judged("one", 9.0, 50000, guidance={"scale": 3.0})
    judged("two", 7.5, 50000, sha256="other weights", precision="bfloat16")
    judged("two", 70.5, 100)
    judged("two", 6.5, 50000)
    (tmp_path / "runs" / "one" / "evaluation.png").write_bytes(encode_png(torch.zeros(1, 8, 8, dtype=torch.uint8)))
    page = drawn(tmp_path, "one,two").read_text()
    tables = re.findall(r"<h2>Evaluated by inception, (\d+) samples each</h2>(.*?)</table>", page, re.DOTALL)
    assert [number for number, _ in tables] == ["50000", "50000", "100"]
    rows = [re.findall(r"<tr><td>(\w+)</td>(.*)<td>([\d.]+)</td></tr>", table) for _, table in tables]
    scales = [f"<td>{scale}</td>" for scale in (1, 3, 1)]  # what differs has a column, and the rest is said once
    alike = list(zip(["one", "one", "two"], scales, ["2.25", "9", "6.5"], strict=True))
    assert rows == [alike, [("two", "", "7.5")], [("two", "", "70.5")]]
    assert "fid by inception (1a1a1a1a, resized: to 299); 50000 samples; labels in_turn; bfloat16;" in tables[1][1]
    assert "reference: training images 2b2b2b2b" in tables[0][1] and "seed 0" in tables[0][1]
    assert f"sampler {brief(EULER)}" in tables[0][1]  # as cards say it
    assert "Evaluations of one" in page and "Evaluations of two" not in page


def test_figures_of_training_stand_beside_those_judged_alike_alone(tmp_path, runs, judged):
    """Three runs judged so, so, and otherwise; one of which nothing is noted."""
    numbers = {"one": 100, "two": 100, "few": 50, "old": None}
    for name, number in numbers.items():
        runs(name, range(10, 70, 10), step=60, fid=100 / 60)
        for step in (30, 60) if number else ():
            judged(name, 100 / step, number, step=step)
    page = drawn(tmp_path, ",".join(numbers)).read_text()
    tables = re.findall(r"<h2>([^<]*)</h2>(?:<p>[^<]*</p>)?<div class=wide>(.*?)</table>", page, re.DOTALL)
    found = {heading: re.findall(r"<tr><td>(\w+)</td>.*?<td>1.667</td></tr>", table) for heading, table in tables}
    assert (
        found["Evaluated by inception, 100 samples each"] == ["one", "two"] and "3.333" not in page
    )  # the last of each
    assert found["Evaluated by inception, 50 samples each"] == ["few"] and found["Final figures"] == []
    assert [heading for heading, rows in found.items() if rows == ["fid"]] == [
        f"Final figures of old, {report.UNKNOWN}"
    ]
    panels = report._panels([report._told(tmp_path / "runs" / name, 4) for name in numbers], "step")
    curves = [(panel.told, [len(points) for points in panel.points]) for panel in panels if panel.figure == "fid"]
    assert [points for _, points in curves] == [[2, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 2]]
    assert "100 samples" in curves[0][0] and "50 samples" in curves[1][0] and curves[2][0].startswith("old, ")


def test_what_cannot_be_read_is_left_out_and_named(tmp_path, runs, judged, capsys):
    runs("one", [10, 20], pictures=[10, 20])
    folder = tmp_path / "runs" / "one"
    judged("one", 7.5, 100)
    with (folder / "evaluation.jsonl").open("a") as file:
        file.write('{"figures": {"fid": 1}, "settings": {"metric": "fid"}}\n{"figures": {"fi')
    whole = folder / "samples" / "step-00000020.png"
    for path in (whole, folder / "evaluation.png"):
        path.write_bytes((folder / "samples" / "step-00000010.png").read_bytes()[:40])
    (folder / "samples" / "step-abc.png").touch()
    page = drawn(tmp_path, "one").read_text()
    assert page.count("data:image/png;base64,") == 1 + 1 and "step 10<" in page and "<td>7.5</td>" in page
    said = capsys.readouterr().out
    for name in ("step-00000020.png is left out", "evaluation.png is left out", "step-abc.png is left out"):
        assert said.count(name) == 1
    assert said.count("evaluation.jsonl: lines 2, 3: no evaluation") == 1
    drawn(tmp_path, "one", f"out={tmp_path}/one.png")


def test_panels_have_axes_units_and_a_legend(tmp_path, runs):
    names = [runs("one", range(1, 100), pictures=[90]), runs("two", range(10, 100, 10), pictures=[30, 60])]
    told = [report._told(tmp_path / "runs" / name, 4) for name in names]
    figure = report._drawn(told, "step", pictures=True)
    curves, *pictures = figure.subfigs
    panels = {panel.get_ylabel(): panel for panel in curves.axes if panel.get_ylabel()}
    assert list(panels) == ["loss", "gradient norm", "learning rate", "images / s", "fid"]
    assert [axes.get_title() for axes in curves.axes if axes.get_ylabel() == "fid"] == [
        f"{name}, {report.UNKNOWN}" for name in names
    ]
    assert all(panel.get_xlabel() == "step" and len(panel.lines) == 2 for panel in panels.values())
    assert len({line.get_color() for line in panels["loss"].lines}) == 2
    assert [line.get_linestyle() for line in panels["loss"].lines] == ["-", "-"]
    assert [text.get_text() for text in curves.legends[0].get_texts()] == ["one", "two"]
    assert (panels["loss"].get_yscale(), panels["learning rate"].get_yscale()) == ("log", "linear")
    assert list(panels["fid"].lines[1].get_xdata()) == [30, 60, 90]  # of lines of their own
    assert 20 not in panels["loss"].lines[0].get_xdata()  # which had none
    assert [part.get_suptitle() for part in pictures] == ["one", "two"]
    by_images = report._drawn(told, "images", pictures=False)
    assert list(by_images.subfigs[0].axes[4].lines[0].get_xdata()) == [960, 1920, 2880]


def test_a_picture_instead(tmp_path, runs):
    runs("one", [10, 20, 30])
    out = drawn(tmp_path, "one", f"out={tmp_path}/deep/one.png")
    assert out.read_bytes()[:4] == b"\x89PNG"


def test_many_runs_are_told_apart(tmp_path, runs):
    names = [runs(f"{'a_long_name' * 3}-{number}", [10, 20]) for number in range(12)]
    drawn(tmp_path, ",".join(names))
    told = [report._told(tmp_path / "runs" / name, 4) for name in names]
    panel = report._drawn(told, "step", pictures=False).subfigs[0].axes[0]
    assert len({(line.get_color(), str(line._dash_pattern)) for line in panel.lines}) == 12


def test_a_name_may_have_commas(tmp_path, runs):
    runs("a,b", [10, 20])
    assert "<h1>a,b</h1>" in drawn(tmp_path, "a,b").read_text()


def test_the_command_line_takes_several_runs(tmp_path, runs, monkeypatch):
    runs("one", [10, 20])
    runs("two", [10, 20])
    monkeypatch.chdir(tmp_path)
    assert launch("report", report, ["run=one,two"]) == 0
    assert "<title>one, two</title>" in (tmp_path / "report.html").read_text()


def test_mistakes(tmp_path, runs, monkeypatch):
    runs("one", [])
    with pytest.raises(ConfigError, match="run=none: no such run"):
        drawn(tmp_path, "none")
    with pytest.raises(ConfigError, match=r"out=report\.pdf: give a name that ends in \.html or \.png"):
        drawn(tmp_path, "one", "out=report.pdf")
    with pytest.raises(ConfigError, match="run=one has no lines in"):
        drawn(tmp_path, "one")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"dit report needs matplotlib: pip install 'ditforge\[plot\]'"):
        drawn(tmp_path, "one")
