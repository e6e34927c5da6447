"""What Weights & Biases has of real runs: configuration, axis, media, lineage, alerts; one run, however often begun."""

import itertools
import json
import os
import shutil
import signal
import time

import pytest
from omegaconf import OmegaConf
from wandb_file import OfflineRun
from wandb_server import serving

from dit.command import export, sync
from dit.command.compose import compose
from dit.train import callbacks, lineage, tracker
from dit.train.run import Run

STEPS, STOPS = 12, (4, 8)


def recipe(folder, data, run, *overrides):
    return compose(
        "train",
        [
            *("experiment=digits_teacher", f"run={run}", f"runs_dir={folder}/runs", f"data_dir={data}"),
            *("logger=wandb", "model.hidden_size=16", "model.depth=1", "model.num_heads=2", "data.num_workers=0"),
            *("trainer.batch_size=32", "trainer.log_every_steps=1", "trainer.preview_every_steps=6"),
            *(f"trainer.max_steps={STEPS}", "trainer.checkpoint_every_steps=6", "sampler.num_steps=2"),
            *("learning_rate=constant", "metric=none", *overrides),
        ],
    )


def student_of(folder, data, teacher, run):
    told = [f"objective.teacher.run={teacher}", f"init.path={folder}/runs/{teacher}"]
    return recipe(folder, data, run, "experiment=digits_consistency", *told, "sampler.num_steps=1", "ema.decay=0.9")


def synced(folder, run, **environment):
    cfg = compose("sync", [f"run={run}", f"runs_dir={folder}/runs", "timeout_seconds=20"])
    sync.check(cfg)
    return sync.main(cfg)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, digits_dir):
    """A teacher that was requeued twice, its student, and an export of the student."""
    folder = tmp_path_factory.mktemp("tracked")
    append, stops = callbacks.append, list(STOPS)

    def stopping(path, line):
        append(path, line)
        if path.name == "metrics.jsonl" and stops and line["step"] == stops[0]:
            stops.pop(0)
            os.kill(os.getpid(), signal.SIGUSR1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks, "append", stopping)
        codes = []
        for restarts in range(3):
            patch.setenv("SLURM_RESTART_COUNT", str(restarts))
            codes.append(Run(recipe(folder, digits_dir, "teacher")).fit())
        patch.delenv("SLURM_RESTART_COUNT")
        assert codes == [75, 75, None]
        assert Run(student_of(folder, digits_dir, "teacher", "student")).fit() is None
    (folder / "runs" / "student" / "summary.json").write_text(json.dumps({"step": STEPS, "frechet": 2.5}))
    judged = {"figures": {"fid": 7.5}, "settings": {"run": "student", "sampler": {"churn_max": float("inf")}}}
    (folder / "runs" / "student" / "evaluation.jsonl").write_text(json.dumps(judged) + "\n")
    shutil.copy(
        folder / "runs" / "student" / "samples" / f"step-{STEPS:08d}.png",
        folder / "runs" / "student" / "evaluation.png",
    )
    written = compose("export", ["run=student", f"runs_dir={folder}/runs", f"path={folder}/few"])
    export.check(written)
    assert export.main(written) == 0
    return folder


def parts(folder, run):
    """The starts of a run as W&B has them offline."""
    return [OfflineRun(path) for path in sorted((folder / "runs" / run / "wandb").glob("offline-run-*"))]


@pytest.mark.slow
def test_a_run_requeued_twice_is_one_run_on_one_axis(folder):
    starts = parts(folder, "teacher")
    assert {start.id for start in starts} == {(folder / "runs" / "teacher" / "wandb-id").read_text()}
    told = [row for start in starts for row in start.rows]
    assert [row["step"] for row in told] == list(range(1, STEPS + 1)) and len(starts) == 3
    assert all(row["_step"] == row["step"] for row in told)
    lines = [json.loads(text) for text in (folder / "runs/teacher/metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in told] == [line["loss"] for line in lines]
    for start in starts:
        assert start.metrics["*"] == "step"


@pytest.mark.slow
def test_the_configuration_is_the_resolved_one(folder):
    resolved = OmegaConf.to_container(OmegaConf.load(folder / "runs/teacher/config.yaml"))
    for start in parts(folder, "teacher"):
        assert {key: start.config[key] for key in resolved} == resolved


@pytest.mark.slow
def test_grids_schedules_and_distances_are_media(folder):
    starts = parts(folder, "teacher")
    previews = {row["step"]: row["preview"] for start in starts for row in start.rows if "preview" in row}
    assert sorted(previews) == [6, STEPS] and all(preview["_type"] == "image-file" for preview in previews.values())
    assert all(
        any((start.folder / "files" / preview["path"]).exists() for start in starts) for preview in previews.values()
    )
    first, *others = [row for start in starts for row in start.rows]
    charts = [name for name in first if name.startswith("schedule/")]
    assert {name.removesuffix("_table") for name in charts} == {"schedule/levels", "schedule/log_snr"}
    assert not any(name.startswith("schedule/") for row in others for name in row)
    assert all(first[name]["_type"] == "table-file" for name in charts)


@pytest.mark.slow
def test_the_lineage_has_the_same_names_and_digests_on_both_sides(folder):
    teacher, student = (
        {thing for start in parts(folder, run) for thing in start.artifacts if thing[1] != "run_table"}
        for run in ("teacher", "student")
    )
    [weights] = [thing for relation, *thing in teacher if relation == "made"]
    assert weights[:2] == ["model", "weights-teacher"]
    assert ("used", *weights) in student
    [data] = [thing for relation, *thing in teacher if relation == "used"]
    assert data[:2] == ["dataset", "digits-train"] and ("used", *data) in student
    assert [thing[1] for relation, *thing in student if relation == "made"] == ["weights-student"]
    held = {file for run in ("teacher", "student") for start in parts(folder, run) for file in start.files}
    assert {file for file in held if not file.endswith(".table.json")} == {"manifest.json"}  # and no weights


@pytest.mark.slow
def test_alerts_tell_of_requeue_and_end(folder):
    titles = [[title for title, _ in start.alerts] for start in parts(folder, "teacher")]
    goes_on, stopped, done = ("teacher: goes on", "teacher: stopped", "teacher: done")
    assert titles == [[stopped], [goes_on, stopped], [goes_on, done]]
    text = parts(folder, "teacher")[2].alerts[0][1]
    assert text == "from step 8: start 3, requeue 2; the one before: exit code 75"


@pytest.mark.slow
def test_sync_makes_one_run_of_offline_parts_and_shows_the_lineage(folder, monkeypatch, capfd):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB__FILE_STREAM_TRANSMIT_INTERVAL", "0.2")
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        assert synced(folder, "teacher") == 0 and f"sent {STEPS} lines and 2 pictures" in capfd.readouterr().out
        assert server.steps == list(range(1, STEPS + 1)) and len(server.names) == 1
        assert server.alerts == []  # of what is long past
        made = [thing for thing in server.made if thing not in server.used and thing[0] != "run_table"]
        [weights] = made
        assert weights[:2] == ("model", "weights-teacher")
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        assert synced(folder, "student") == 0
        assert weights in server.used
        assert sorted(name for _, name, _ in server.used) == ["digits-train", "weights-teacher"]
        made = sorted(name for kind, name, _ in server.made if kind == "model")
        assert made == ["export-few", "weights-student", "weights-teacher"]
        assert server.summary["evaluation/fid"] == 7.5
        assert server.summary["evaluation/settings"]["run"] == "student"
        assert server.summary["evaluation/plot"]["_type"] == "image-file"
        assert any(name.startswith("media/images/evaluation/plot") for name in server.files)
        assert server.summary["frechet"] == 2.5 and any("distances_table" in line for line in server.history)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["closed port", "black hole"])
def test_a_server_that_is_not_there_costs_a_step_less_than_a_second(tmp_path, digits_dir, monkeypatch, fault, capfd):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(tracker, "FINISH_SECONDS", 1.0)
    append, moments = callbacks.append, []

    def noting(path, line):
        append(path, line)
        moments.append(time.perf_counter())

    monkeypatch.setattr(callbacks, "append", noting)
    with serving() as server:
        server.silent = True
        monkeypatch.setenv("WANDB_BASE_URL", server.url if fault == "black hole" else "http://127.0.0.1:9")
        assert Run(recipe(tmp_path, digits_dir, "alone", "trainer.max_steps=300")).fit() is None
    assert "training is not affected, and `dit sync run=alone" in capfd.readouterr().out
    assert len(moments) == 300 and max(then - now for now, then in itertools.pairwise(moments)) < 1


def test_what_a_student_of_an_export_uses_is_what_its_run_made(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "few").mkdir(exist_ok=True)
        (tmp_path / "few" / name).write_text('{"config": {}, "step": 3, "weights": "ema"}')
    (tmp_path / "run").mkdir()
    lineage.note_made(tmp_path / "run", tmp_path / "few")
    lineage.note_made(tmp_path / "run", tmp_path / "few")
    config = {"data": {}, "objective": {"teacher": {"runs_dir": str(tmp_path), "run": "few", "step": None}}}
    (tmp_path / "student").mkdir()
    lineage.note_used(tmp_path / "student", config, "1")
    [made], [used] = (lineage.noted(tmp_path / name) for name in ("run", "student"))
    assert (made["relation"], used["relation"], made["name"]) == ("made", "used", "export-few")
    assert made["file"] == used["file"]
    assert (tmp_path / "run" / made["file"]).read_bytes() == (tmp_path / "student" / used["file"]).read_bytes()


def test_no_teacher_is_used_where_there_is_none(tmp_path):
    absent = {"_target_": "dit.objective.teacher.absent", "run": "digits_teacher", "runs_dir": "runs"}
    (tmp_path / "weights.pt").write_bytes(b"12")
    init = {"_target_": "dit.weights.convert.published", "path": f"{tmp_path}/weights.pt"}
    data = {"path": ["s3://bucket/one", "two"], "index": None}
    lineage.note_used(tmp_path, {"data": data, "objective": {"teacher": absent}, "init": init}, "1f")
    names = [(line["type"], line["name"]) for line in lineage.noted(tmp_path)]
    assert names == [("dataset", "bucket-one"), ("dataset", "two"), ("model", "weights.pt")]
    assert [line["about"].get("fingerprint") for line in lineage.noted(tmp_path)] == ["1f", "1f", None]


def test_notes_that_cannot_be_made_end_nothing(tmp_path, capsys):
    for folder, init in ((tmp_path / "gone", {}), (tmp_path, {"_target_": lineage.RUN, "path": f"{tmp_path}/gone"})):
        lineage.note_used(folder, {"data": {"path": "some"}, "objective": {}, "init": init}, "1")
        assert "lineage.jsonl lacks it" in capsys.readouterr().out
