"""`dit evaluate`, and figures while training."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from test_conf import dit

from dit.command import evaluate
from dit.command.compose import ConfigError, compose, launch
from dit.command.plot import plot
from dit.train import checkpoint
from dit.train import judged as records
from dit.train.judged import ALIKE
from dit.train.reference import chosen
from dit.train.run import Run
from dit.train.samples import Kept
from dit.train.world import World

TINY = [
    *("experiment=digits", "metric=none", "logger=none", "model.hidden_size=16", "model.depth=1", "model.num_heads=2"),
    *("trainer.max_steps=3", "data.num_workers=0", "sampler.num_steps=3", "learning_rate.warmup_steps=0"),
]


@pytest.fixture(scope="module")
def where(tmp_path_factory, digits_dir):
    """A folder with two tiny runs, and the words that name it."""
    folder = tmp_path_factory.mktemp("evaluate")
    for run, more in {"one": [], "other": ["seed=1", "sampler.num_steps=4"]}.items():
        words = [*TINY, f"run={run}", f"runs_dir={folder}/runs", f"data_dir={digits_dir}", *more]
        assert Run(compose("train", words)).fit() is None
    return folder


def judged(where, *words, run="one"):
    """The last line that `dit evaluate` writes, in this process."""
    asked = [f"run={run}", f"runs_dir={where}/runs", "accelerator=cpu", *words]
    evaluate.prepare(asked)
    cfg = compose("evaluate", asked)
    evaluate.check(cfg)
    assert evaluate.main(cfg) == 0
    return lines(Path(cfg.out) if cfg.out else where / "runs" / run / "evaluation.jsonl")[-1]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("several", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_statistics_do_not_depend_on_the_processes(tmp_path, digits_dir, several):
    found = {}
    for number in (1, several):
        path = tmp_path / f"{number}.npz"
        words = (f"reference={path}", "data=digits", "extractor=small", f"processes={number}", "num_images=300")
        code, output, _ = dit("evaluate", *words, f"data_dir={digits_dir}", "accelerator=cpu")
        assert code == 0, output
        with np.load(path) as file:
            found[number] = {name: file[name] for name in file.files}
    assert found[1]["mu"].shape == (64,) and found[1]["sigma_s"].shape == (112, 112)
    assert found[1]["arr_0"].shape == (300, 8, 8, 1) and found[1]["arr_0"].dtype == np.uint8
    for name, value in found[1].items():
        difference = np.abs(found[several][name].astype(float) - value.astype(float)).max()
        assert difference <= 1e-10 * np.abs(value.astype(float)).max(), name
    about = json.loads((tmp_path / "1.npz.json").read_text())
    assert about["number"] == 1257 and about["extractor"]["name"] == "small-64-0" and about["image_size"] == 8
    code, output, _ = dit("evaluate", f"reference={tmp_path}/1.npz", "data=digits", "extractor=small")
    assert code == 2 and "exists: take another name, or overwrite=true" in output


def test_samples_and_figures_do_not_depend_on_the_processes(where):
    figures, samples = {}, {}
    for number in (1, 2):
        npz, out = where / f"samples-{number}.npz", where / f"{number}.jsonl"
        words = ("metric=[fid,kid]", "metric.kid.figure.subset_size=100", "num_samples=250", "batch_size=50")
        words += ("sampler=ddpm", "sampler.num_steps=4", "labels=random")  # which draws fresh noise
        words += (f"processes={number}", f"samples={npz}", f"out={out}", "accelerator=cpu")
        code, output, _ = dit("evaluate", "run=one", f"runs_dir={where}/runs", *words)
        assert code == 0, output
        [record] = lines(out)
        figures[number], samples[number] = record["figures"], np.load(npz)["arr_0"]
    assert samples[1].shape == (250, 8, 8, 1) and np.array_equal(samples[1], samples[2])
    assert figures[1] == pytest.approx(figures[2], rel=1e-9) and figures[1]["fid"] > 0
    assert set(figures[1]) == {"fid", "kid", "kid_std"}


def test_what_was_drawn_is_not_drawn_again(where, monkeypatch):
    drawn = []
    before = Kept.__call__

    def counted(kept, number, draw):
        return before(kept, number, lambda: drawn.append(number) or draw())

    monkeypatch.setattr(Kept, "__call__", counted)
    words = ("num_samples=120", "batch_size=50", "keep_samples=true", "seed=7")
    first = judged(where, "metric=fid", *words)
    assert drawn == [0, 1, 2]
    [folder] = (where / "runs" / "one" / "evaluation").iterdir()
    (folder / "000001.npy").write_bytes((folder / "000001.npy").read_bytes()[:300])  # as a full disk leaves it
    del drawn[:]
    again = judged(where, "metric=[fid,prec_recall]", *words)
    assert drawn == [1] and again["figures"]["fid"] == first["figures"]["fid"]
    np.save(folder / "000000.npy", np.load(folder / "000000.npy")[:20])  # whole, but not a part
    del drawn[:]
    assert judged(where, "metric=fid", *words) == again  # said again, as the last line stays
    assert not drawn
    more = judged(where, "metric=fid", *words[1:], "num_samples=200")
    assert drawn == [0, 3] and more["figures"]["fid"] != first["figures"]["fid"]
    shutil.rmtree(folder)
    (where / "runs" / "one" / "evaluation.jsonl").unlink()
    assert judged(where, "metric=fid", *words[1:], "num_samples=200") == more  # of samples that were all drawn anew
    kept = Kept(folder, World(), (50, 8, 8, 1))
    with pytest.raises(ConfigError, match="these samples are being drawn just now"):
        judged(where, "metric=fid", *words[1:], "num_samples=100")
    kept.drop()


def test_samples_of_an_evaluation_that_is_known(where, tmp_path):
    words = ("metric=fid", "num_samples=30", "seed=3", f"out={tmp_path}/all.jsonl")
    judged(where, *words)
    judged(where, *words, f"samples={tmp_path}/drawn.npz")
    assert len(lines(tmp_path / "all.jsonl")) == 1 and np.load(tmp_path / "drawn.npz")["arr_0"].shape == (30, 8, 8, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.jsonl", "drawn.npz"]


def test_a_run_that_may_only_be_read_and_is_from_before_extractors(where, tmp_path):
    folder = tmp_path / "runs" / "one"
    shutil.copytree(where / "runs" / "one", folder, ignore=shutil.ignore_patterns("evaluation*"))
    config = OmegaConf.load(folder / "config.yaml")
    del config["extractor"]
    OmegaConf.save(config, folder / "config.yaml")
    (tmp_path / "runs" / "references").touch()  # so that nothing can be written there
    before = sorted(folder.iterdir())
    out = tmp_path / "all.jsonl"
    words = ("metric=fid", "num_samples=30", f"out={out}")
    with pytest.raises(ConfigError, match=r"extractor\.path"):
        judged(tmp_path, *words, "extractor.path=/nowhere")
    judged(tmp_path, *words, "extractor=small")
    assert len(lines(out)) == 1 and sorted(folder.iterdir()) == before


def test_all_that_moves_a_figure_is_noted(where):
    settings = judged(where, "metric=fid", "num_samples=40")["settings"]
    assert settings["extractors"]["fid"]["name"] == "small-64-0" and len(settings["extractors"]["fid"]["sha256"]) == 64
    assert settings["sampler"]["num_steps"] == 3 and settings["guidance"]["scale"] == 1 and settings["step"] == 3
    keys = {"reference", "image_size", "num_samples", "labels", "precision", "seed", "batch_size", "weights", "grid"}
    assert keys <= settings.keys()


@pytest.mark.parametrize("name", ALIKE)
def test_unlike_figures_are_not_compared(name):
    settings = dict.fromkeys(ALIKE, 1) | {"run": "one"}
    evaluate.check_alike([settings, {**settings, "run": "other", "seed": 3}])
    with pytest.raises(ValueError, match=rf"not judged alike.*{name} is 1 and 2"):
        evaluate.check_alike([settings, {**settings, name: 2}])


def test_runs_side_by_side_over_guidance_and_steps(where):
    words = ("metric=[fid,prec_recall]", "against=other", "scales=[1,2]", "steps=[2,4]", "num_samples=60")
    out = where / "grid.jsonl"
    code, output, _ = dit("evaluate", "run=one", f"runs_dir={where}/runs", *words, f"out={out}", "accelerator=cpu")
    assert code == 0, output
    table = [line for line in output.splitlines() if line.startswith("| o")]
    assert len(table) == 8 and sum(line.startswith("| other ") for line in table) == 4
    assert len({line for line in table}) == 8 and "fid" in output
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    scales = {(r["settings"]["run"], r["settings"]["guidance"]["scale"]) for r in lines(out)}
    assert scales == {(run, scale) for run in ("one", "other") for scale in (1, 2)}


def test_a_sweep_loads_the_weights_once(where, tmp_path, monkeypatch):
    loaded, load = [], evaluate.load
    monkeypatch.setattr(evaluate, "load", lambda cfg: loaded.append(cfg) or load(cfg))
    words = ("metric=fid", "num_samples=30")
    last = judged(where, *words, "scales=[1,2]", "steps=[2,4]", f"out={tmp_path}/sweep.jsonl")
    assert len(loaded) == 1
    assert last == judged(where, *words, "guidance.scale=2", "sampler.num_steps=4", f"out={tmp_path}/one.jsonl")


def test_mistakes_are_told_before_anything_is_drawn(where, tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "large.npz", arr_0=rng.integers(0, 256, (30, 16, 16, 3), dtype=np.uint8))
    np.savez(tmp_path / "bare.npz", mu=np.zeros(64), sigma=np.eye(64))
    np.savez(
        tmp_path / "wide.npz",
        mu=np.zeros(2048),
        sigma=np.eye(2048),
        arr_0=rng.integers(0, 256, (30, 8, 8, 3), dtype=np.uint8),
    )
    np.savez(tmp_path / "wide_bare.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "bare.npz").read_bytes()[:900])
    np.savez(tmp_path / "flat.npz", arr_0=rng.integers(0, 256, (30, 8, 9, 3), dtype=np.uint8))
    np.savez(tmp_path / "layers.npz", arr_0=rng.integers(0, 256, (30, 8, 8, 2), dtype=np.uint8))
    np.savez(tmp_path / "single.npz", arr_0=rng.integers(0, 256, (1, 8, 8, 3), dtype=np.uint8))
    np.savez(tmp_path / "text.npz", mu=np.array(["a"] * 64), sigma=np.eye(64))
    np.savez(tmp_path / "crooked.npz", mu=np.zeros(64), sigma=np.triu(np.ones((64, 64))))
    np.savez(tmp_path / "negative.npz", mu=np.zeros(64), sigma=-np.eye(64))
    np.savez(tmp_path / "noted.npz", mu=np.zeros(64), sigma=np.eye(64))
    (tmp_path / "noted.npz.json").write_text('{"extractor": "small", "number": 9, "image_size": 8}')
    judged(where, "metric=fid", "num_samples=30")
    before = (where / "runs" / "one" / "evaluation.jsonl").read_bytes()
    for words, message in {
        ("metric=fid", f"reference={tmp_path}/none.npz"): "there is no such file",
        ("metric=fid", f"reference={tmp_path}/cut.npz"): "is no .npz that can be read",
        ("metric=fid", f"reference={tmp_path}/large.npz"): "of images of 16 pixels, but the run draws 8",
        ("metric=fid", f"reference={tmp_path}/wide.npz"): "statistics of 2048 features, but the extractor small",
        ("metric=fid", f"reference={tmp_path}/wide_bare.npz"): "statistics of 2048 features, but the extractor small",
        ("metric=fid", f"reference={tmp_path}/flat.npz"): "of images of 9 pixels, but the run draws 8",
        ("metric=fid", f"reference={tmp_path}/layers.npz"): "of images of 2 channels, but the run draws 1",
        ("metric=fid", f"reference={tmp_path}/single.npz"): "arr_0 has 1 images, and statistics need 2",
        ("metric=fid", f"reference={tmp_path}/text.npz"): "mu <U1 .* are no mean and covariance",
        ("metric=fid", f"reference={tmp_path}/crooked.npz"): "are no mean and covariance",
        ("metric=fid", f"reference={tmp_path}/negative.npz"): "are no mean and covariance",
        ("metric=fid", f"reference={tmp_path}/noted.npz"): r"noted\.npz\.json is damaged",
        ("metric=fid", "extractor.num_features=0"): "extractor.num_features=0 must be at least 1",
        ("metric=fid", "out=[a]"): r"out=\['a'\]: give a name or a path",
        ("metric=fid", f"samples={tmp_path}/bare.npz/x.npz"): "samples=.*/x.npz cannot be written",
        ("metric=sfid", f"reference={tmp_path}/bare.npz"): "no statistics of spatial features, nor images",
        ("metric=kid", f"reference={tmp_path}/bare.npz"): "has statistics alone, but metric=kid reads images",
        ("metric=fid", "extractor=inception", "extractor.path=/nowhere"): r"extractor\.path=/nowhere: there is no",
        ("metric=kid", "num_samples=500"): "subset_size=1000, but there are 500 images",
        ("metric=fid", "num_samples=5"): "num_samples=5 must be at least 20",
        ("metric=[fid,kod]",): "no such option; did you mean kid",
        ("metric=fid", "scales=[1,-2]"): "scales=-2.* must be at least 0",
        ("metric=fid", "against=nobody"): "run=nobody: no such run",
        ("metric=fid", "labels=mixed"): "labels=mixed: choose one of in_turn, random",
        ("metric=fid", "samples=x.png"): "give a name that ends so",
        ("metric=classifier", "samples=x.npz"): "choose one of them, too",
        (): "there is no metric for run=one: choose one, like metric=fid",
        ("metric=fid", f"samples={tmp_path}/bare.npz"): "samples=.*bare.npz exists: take another name",
        ("metric=fid", "out=plot.png"): "out=plot.png: the file is a .jsonl",
        ("metric=fid", "reference=5"): "reference=5: give a name or a path",
        ("metric=classifier", f"reference={tmp_path}/bare.npz"): "is for metrics that look at samples, like fid",
    }.items():
        with pytest.raises(ConfigError, match=message):
            judged(where, *words)
    assert (where / "runs" / "one" / "evaluation.jsonl").read_bytes() == before


def test_a_reference_of_statistics_gives_the_figure_of_the_images(where, tmp_path, digits_dir):
    path = tmp_path / "digits.npz"
    cfg = compose("reference", [f"reference={path}", "data=digits", "extractor=small", f"data_dir={digits_dir}"])
    evaluate.check(cfg)
    assert evaluate.main(cfg) == 0
    words = ("metric=[fid,sfid,prec_recall]", "num_samples=100")
    ours, theirs = judged(where, *words), judged(where, *words, f"reference={path}")
    assert theirs["figures"] == pytest.approx(ours["figures"], rel=1e-9)
    with pytest.raises(ValueError, match="not judged alike"):
        evaluate.check_alike([ours["settings"], theirs["settings"]])
    for cached in (where / "runs" / "references").iterdir():
        cached.write_bytes(cached.read_bytes()[:100])
    assert judged(where, *words, f"out={tmp_path}/again.jsonl")["figures"] == ours["figures"]


def test_too_few_samples_are_told_before_training(config):
    with pytest.raises(ValueError, match="subset_size=1000, but there are 500 images"):
        Run(config("run=few", "metric=kid", "evaluation.every_steps=3", "evaluation.few_images=500"))


def weights(run):
    return checkpoint.load_weights(checkpoint.newest(run.folder / "checkpoints"), "ema")


def test_figures_while_training_leave_training_as_it_is(config):
    plain = config("run=plain", "trainer.max_steps=8")
    judging = ["metric=[fid,kid]", "metric.kid.figure.subset_size=50", "evaluation.few_images=60"]
    judging += ["evaluation.every_steps=3", "evaluation.num_images=80", "evaluation.batch_size=20"]
    also = config("run=also", "trainer.max_steps=8", *judging)
    runs = [Run(cfg) for cfg in (plain, also)]
    for run in runs:
        assert run.fit() is None
    one, other = map(weights, runs)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    said = [line for line in lines(runs[1].folder / "metrics.jsonl") if "fid" in line]
    assert [line["step"] for line in said] == [3, 6] and all(line["fid"] > 0 and "kid" in line for line in said)
    assert said[0]["fid"] != said[1]["fid"]
    summary = json.loads((runs[1].folder / "summary.json").read_text())
    assert summary["fid"] > 0 and summary["loss"] is not None


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp", "fsdp", "zero2", "zero3"])
def test_figures_while_training_do_not_depend_on_the_processes(tmp_path, tiny, trainer):
    """Under any strategy, with averaged weights."""
    judging = ["metric=[fid,kid]", "metric.kid.figure.subset_size=50", "evaluation.few_images=70"]
    judging += ["evaluation.every_steps=3", "evaluation.num_images=110", "evaluation.batch_size=20"]
    found = {}
    for name, more in {
        "one": [],
        "two": [f"trainer={trainer}", "trainer.devices=2", "trainer.accelerator=cpu"],
    }.items():
        words = tiny(f"run={name}", "trainer.max_steps=6", "trainer.precision=32-true", *judging, *more)
        code, output, _ = dit("train", *words)
        assert code == 0, output
        folder = tmp_path / "runs" / name
        [line] = [line for line in lines(folder / "metrics.jsonl") if "fid" in line]
        found[name] = [line, json.loads((folder / "summary.json").read_text())]
        noted = lines(folder / "evaluation.jsonl")
        assert [record["settings"]["step"] for record in noted] == [3, 6]
        assert all((record["settings"]["sha256"] is None) == (name == "two" and trainer != "ddp") for record in noted)
    for one, two in zip(*found.values(), strict=True):
        assert two["fid"] == pytest.approx(one["fid"], rel=1e-4) and two["kid"] == pytest.approx(one["kid"], abs=1e-4)


@pytest.mark.parametrize(("first", "number", "total", "most"), [(0, 10, 10, 20), (0, 100, 100, 7), (0, 40, None, 9)])
def test_images_of_a_reference_are_evenly_spaced(first, number, total, most):
    whole = chosen(first, number, total, most)
    assert whole.sum() == min(number, most)
    parts = [chosen(start, min(7, number - start), total, most) for start in range(0, number, 7)]
    assert torch.equal(torch.cat(parts), whole)
    gaps = whole.nonzero()[:, 0].diff()
    assert total is None or total <= most or set(gaps.tolist()) <= {total // most, total // most + 1}


def test_what_training_judges_is_noted_as_by_dit_evaluate(config, tmp_path, monkeypatch):
    judging = ["metric=fid", "extractor=small", "evaluation.few_images=60", "evaluation.every_steps=3"]
    words = ["run=noted", "trainer.max_steps=8", *judging, "evaluation.num_images=80", "evaluation.batch_size=20"]
    folder = tmp_path / "runs" / "noted"
    path = folder / "evaluation.jsonl"

    def fit(*more):
        assert Run(config(*words, *more)).fit() is None
        return lines(path)

    first = fit()
    noted = [(record["by"], record["settings"]["step"], record["settings"]["num_samples"]) for record in first]
    assert noted == [("train", 3, 60), ("train", 6, 60), ("train", 8, 80)]
    again = judged(tmp_path, "num_samples=80", "batch_size=20", run="noted")
    assert again == first[-1] and lines(path) == first  # which has the same settings, the weights' hash among them
    other = judged(tmp_path, "num_samples=80", "batch_size=20", "seed=1", run="noted")
    shutil.rmtree(folder / "checkpoints" / "step-00000008")
    assert fit() == [first[0], other, *first[1:]]  # from step 5
    (folder / "summary.json").unlink()
    assert fit() == [first[0], other, *first[1:]]  # as if ended before that was written

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records, "append", full)
    assert fit("trainer.max_steps=9") == [first[0], other, *first[1:]]
    assert [line["step"] for line in lines(folder / "metrics.jsonl") if "fid" in line] == [3, 6]


def test_unlike_runs_are_told_before_anything_is_drawn(where, tmp_path, monkeypatch, capsys):
    for run, metric in {"mine": "fid", "yours": "sfid"}.items():
        shutil.copytree(where / "runs" / "one", tmp_path / "runs" / run)
        config = OmegaConf.load(tmp_path / "runs" / run / "config.yaml")
        config.metric = compose("train", ["experiment=digits", f"metric={metric}", "extractor=small"]).metric
        OmegaConf.save(config, tmp_path / "runs" / run / "config.yaml", resolve=True)
    monkeypatch.setattr(evaluate, "load", lambda cfg: pytest.fail("weights are loaded"))
    with pytest.raises(SystemExit, match="2"):
        launch("evaluate", evaluate, ["run=mine", "against=yours", f"runs_dir={tmp_path}/runs", "accelerator=cpu"])
    assert "run=mine and run=yours are not judged alike" in capsys.readouterr().err


@pytest.mark.parametrize("against", ["one", "[other,other]", "[other,RUNS/other]"])
def test_a_run_stands_in_a_table_once(where, against):
    with pytest.raises(ConfigError, match="is in the table already; name each run once"):
        judged(where, "metric=fid", f"against={against.replace('RUNS', str(where / 'runs'))}")


def test_a_plot_over_steps_has_those_asked_for(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    settings = {"run": "one", "guidance": {}, "num_samples": 9, "weights": "ema"}
    plot(
        [
            {"figures": {"fid": n}, "settings": {**settings, "sha256": of, "sampler": {"num_steps": n}}}
            for of in "ab"
            for n in (50, 9, 10)
        ],
        tmp_path,
    )
    labels = [line.get_label() for line in drawn[0].axes[0].lines]
    assert labels == ["one, guidance 1", "one (2), guidance 1"] and drawn[0].get_suptitle().startswith("one, one (2):")
    axis = drawn[0].axes[0].xaxis
    assert [label.get_text() for label in axis.get_ticklabels()] == ["9", "10", "50"] and not len(
        axis.get_minorticklocs()
    )


@pytest.fixture(scope="module")
def record(where):
    return judged(where, "metric=fid", "num_samples=40")


@pytest.mark.parametrize(
    "wrong",
    [
        *({"figures": [1, 2]}, {"figures": {"fid": "2"}}, {"figures": {}}, {"settings": []}, {"settings": None}),
        *({"metric": "fid"}, {"metric": {"fid": 1}}, {"extractors": {"fid": {"name": "small"}}}, {"sampler": "ddim"}),
        *({"sampler": {"_target_": "sample"}}, {"sampler": {"eta": "0"}}, {"guidance": {"weak": {"eta": []}}}),
        *({"step": "50"}, {"step": True}, {"seed": None}, {"run": 1}),
    ],
)
def test_what_is_no_evaluation_is_left_out_and_stays(record, tmp_path, capsys, wrong):
    path, trained = tmp_path / "evaluation.jsonl", record | records.TRAINING
    damaged = trained | {"settings": record["settings"] | wrong}
    damaged |= {key: value for key, value in wrong.items() if key in record}
    unknown = [json.dumps(damaged).encode(), b'{"step": 50}', b"\xff", b'{"by": "train", "fig']
    path.write_bytes(b"\n".join([json.dumps(record).encode(), json.dumps(trained).encode(), *unknown]))
    for _ in range(2):
        assert records.evaluations(path) == [record, trained]
    assert capsys.readouterr().out.count(f"{path}: lines 3, 4, 5, 6: no evaluation") == 1
    records.rewind(path, 3)
    assert records.evaluations(path) == [record, trained]
    records.rewind(path, 2)
    assert path.read_bytes() == b"\n".join([json.dumps(record).encode(), *unknown])
    assert records.note(path, {"fid": 0.0}, record["settings"]) == record["figures"]  # which stand there


def test_runs_of_one_name_are_told_apart(record):
    """A run and exports of it: of other weights, and of the same."""
    runs = {"one": ("one", "a"), "one (2)": ("one", "b"), "one (3)": ("one", "a"), "other": ("other", "a")}
    several = [
        {"settings": record["settings"] | {"run": run, "sha256": sha256, "guidance": {"scale": scale}}}
        for run, sha256 in runs.values()
        for scale in (1.0, 2.0)
    ]
    assert records.run_names(several) == [name for name in runs for _ in range(2)]
