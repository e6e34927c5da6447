"""dit index: where every file of every sample lies, and whether it is all there."""

import os

from omegaconf import DictConfig

from dit.command.compose import check_least, check_texts, user_errors
from dit.data.store import DataError, Store

VERBATIM = ("path", "out", "shards")


def check(cfg: DictConfig) -> None:
    """What can be said of a configuration before anything is read.

    Raises:
        ConfigError: naming the value and the way out.
    """
    check_texts(cfg, ["path", "shards"])
    check_least(cfg, {"num_workers": 1})


def tell_apart(cfg: DictConfig, suffix: str) -> None:
    """Nothing: the jobs of a multirun differ by their folders."""


def main(cfg: DictConfig) -> int:
    """Index a folder, or verify one that is indexed; the exit code.

    Raises:
        DataError: if shards are not as they were indexed.
    """
    num_workers = cfg.num_workers or len(os.sched_getaffinity(0))
    with user_errors():
        from dit.data import index
        from dit.data.sample import IMAGE_EXTENSIONS, LATENT, Decoder

        fields = Decoder(1, 1, 1, cfg.fields).files()
        place = cfg.out or cfg.path
        if index.has_index(place) and not (cfg.again or cfg.lenient):
            found, changed = index.verify(cfg.path, place, num_workers)
            for name in cfg.fields if not changed else ():
                way_out = f": leave such samples out by dit index path={cfg.path} lenient=true 'fields=[{name}]'"
                index.check_files(Store(str(place)), found.shards, fields[name], name, way_out)
        else:
            fields["image"] = (*IMAGE_EXTENSIONS, LATENT)
            options = {"shards": cfg.shards, "out": cfg.out, "lenient": cfg.lenient, "num_workers": num_workers}
            found, changed = index.write(cfg.path, require=list(fields.values()), **options), []
    if changed:
        listed = "".join(f"\n  {damage}" for damage in changed[:20])
        raise DataError(
            f"{len(changed)} of {len(found.shards)} shards of {cfg.path} are not as they were indexed:{listed}\n"
            "restore them, or accept them as they are by again=true"
        )
    files: dict[str, int] = {}
    for shard in found.shards:
        for extension, number in shard.files.items():
            files[extension] = files.get(extension, 0) + number
    lines = {
        "shards": f"{len(found.shards):,}",
        "samples": f"{sum(shard.samples for shard in found.shards):,}",
        "GiB": f"{sum(shard.bytes for shard in found.shards) / 2**30:,.3g}",
        "files": ", ".join(f"{number:,} .{extension}" for extension, number in sorted(files.items())),
        "left out": f"{found.about.get('left_out', 0):,}",
        "fingerprint": found.fingerprint,
        "index": Store(str(place)).url(index.MANIFEST),
    }
    for name, value in lines.items():
        print(f"  {name:<12} {value}")
    return 0
