"""Evaluations, as `dit evaluate` notes them."""

from dit.train.files import append

EXTRACTOR = {"name": "small-64-0", "sha256": "01234567" * 8, "resize": "none"}
SETTINGS = {
    **{"run": "one", "weights": "ema", "step": 8, "sha256": None, "device": "cpu", "sampler": {}, "grid": {}},
    **{"guidance": {}, "seed": 0, "batch_size": 500, "metric": {"fid": {}}, "extractors": {"fid": EXTRACTOR}},
    **{"reference": {"training_images": "2b" * 8, "rows": 9}, "image_size": 8, "num_samples": 20},
    **{"labels": "in_turn", "precision": "float32"},
}


def note(folder, figures, **settings):
    """Append one to those of a run; the record."""
    record = {"figures": figures, "settings": {**SETTINGS, **settings}}
    append(folder / "evaluation.jsonl", record)
    return record
