"""A training run: its folder, its beginning, its continuation and its end."""

import fcntl
import itertools
import json
import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from dit.data.unheard import unheard
from dit.metric.subject import Samples, Subject
from dit.train import checkpoint, goodput, judged, lineage
from dit.train.attempts import Attempts
from dit.train.build import build
from dit.train.checked import build_trained, checked
from dit.train.devices import layout_of, settled
from dit.train.encoding import check_encoded, identity
from dit.train.environment import gathered
from dit.train.files import replace, rewound
from dit.train.judging import Judging
from dit.train.pairs import check_pairs
from dit.train.published import beginning, unlike
from dit.train.same import differences, taught_by
from dit.train.saved import PROGRESS, averages, summary_of
from dit.train.strategy import Strategy, trained
from dit.train.transfer import transfers
from dit.train.watchdog import Watchdog
from dit.train.world import Lost, World, is_connection
from dit.weights.identity import sha256

if TYPE_CHECKING:  # importing lightning takes seconds, which a mistake in the configuration need not wait for
    from lightning.pytorch import Trainer

    from dit.train.callbacks import Recorder
    from dit.train.module import DiffusionModule
    from dit.train.preemption import Preemption

LOCK_SECONDS = 180.0
PRECISION = {"32-true": "float32", "bf16-mixed": "bfloat16"}  # Lightning's words, and those of `dit evaluate`


class Run:
    """A run, checked as far as can be without training: configuration, data, folder, checkpoint.

    Starting a name again goes on from its newest intact checkpoint. What decides the numbers of a run must then be as
    it was; its length, its periods and how it is sampled may differ.

    Args:
        cfg: the composed configuration of `conf/train.yaml`.

    Raises:
        ValueError: if the configuration, the data or the folder does not do, with the way out.
        ImportError: if an optional dependency is missing.
        CheckpointError: if there are checkpoints but none is intact.
    """

    def __init__(self, cfg: DictConfig):
        self.clock = goodput.Clock()
        self.cfg = cfg = settled(cfg)
        self.world = World()
        self.layout = layout_of(cfg.trainer, self.world)
        self.data, self.parts, self.objective, denoiser, strategy, self.num_micro_batches = checked(cfg, self.layout)
        self.tracker = build(cfg.logger)
        self.device = self.world.device("cuda" if cfg.trainer.accelerator == "gpu" else "cpu")
        self.folder = Path(cfg.runs_dir) / cfg.run
        self.watchdog = Watchdog(self.world, self.folder, cfg.trainer.timeout_seconds)
        self.clock.listener = self.watchdog.enters
        self._lock: TextIO | None = None
        try:
            self._meet(denoiser, strategy)
        except BaseException:
            self._leave()
            raise

    def _meet(self, denoiser: Any, strategy: type[Strategy]) -> None:
        """Connect the processes, and check what is on this machine: data, devices, the folder."""
        if self.world.size > 1 or strategy.needs_group:
            self.world.join(self.device.type, self.cfg.trainer.timeout_seconds)
        if self.world.size > 1:
            self.watchdog.start()
        self._check_data()  # before the optimizer, whose making takes seconds
        if self.cfg.metric:
            self.data.check_images()
        self.parts.condition.check(self.data.first() if self.data.there else None)
        build_trained(self.cfg, denoiser)
        self.strategy = strategy(self.cfg.trainer, self.world, self.device)
        self.num_parameters = sum(p.numel() for p in denoiser.network.parameters())
        self.num_trained = sum(p.numel() for p in trained(denoiser.network).values())
        self.latent = self.parts.latent()
        # Hashing a VAE takes a while, so that it is done once.
        self.encoder = identity(self.latent) if self.latent.name or self.data.about else {}
        if self.data.about:
            check_encoded(
                self.data.about, self.encoder, self.latent.shape, self.cfg.data.image_size, self.cfg.data.path
            )
            if "pairs" in self.data.about:
                check_pairs(self.data.about, self.parts.condition.sizes, self.cfg.objective.scale, self.cfg.data.path)
            if (text := self.data.about.get("text", {}).get("name")) != self.cfg.condition.get("name", text):
                print(f"dit: WARNING: captions were read by {text}, but prompts will be by {self.cfg.condition.name}")
        self.judging = self._judging()
        if self.judging:
            how = self.cfg.evaluation
            numbers = [how.num_images, *([how.few_images] if how.every_steps else [])]
            self.judging.check(self.parts.subject(denoiser, self.latent, seed=self.cfg.seed, batch_size=1), numbers)
        begins = not checkpoint.committed(self.folder / "checkpoints")
        self.init = self._initial() if "_target_" in self.cfg.init and begins else None
        self.resolved: Any = OmegaConf.to_container(self.cfg, resolve=True)
        self.resume_from = self.world.once(self._claim)
        self.step = checkpoint.step_of(self.resume_from) if self.resume_from else 0

    def _judging(self) -> Judging | None:
        """The metrics, whose extractors are had before anything is trained."""
        if not self.cfg.metric:
            return None
        return Judging(
            self.cfg.metric,
            self.data,
            world=self.world,
            device=self.device,
            cache=Path(self.cfg.runs_dir) / "references",
            reference=self.cfg.evaluation.reference,
            rank=self.strategy.data_rank,
            size=self.strategy.data_size,
        )

    def _initial(self) -> dict[str, Tensor]:
        """The weights to begin with, as the network needs them, and its adapter."""
        network = self.parts.denoiser("meta").network
        weights = beginning(self.cfg.init, self.cfg.noise, self.cfg.prediction, network)
        if told := unlike(self.cfg.init, self.cfg.noise, self.cfg.prediction):
            print(f"dit: {told}: it does not begin as its equal", flush=True)
        if not self.parts.adapter:
            return weights
        network.load_state_dict(weights, assign=True)
        torch.manual_seed(self.cfg.seed)
        return dict(self.parts.adapter(network).state_dict())

    def _denoiser(self) -> Any:
        """The denoiser, or what stands for it; without weights, where its network can draw them afterwards."""
        denoiser = self.parts.learner("meta")
        return denoiser if hasattr(denoiser.network, "reset_parameters") else self.parts.learner()

    def _check_data(self) -> None:
        """By the first process alone at first, which makes what is missing of an index."""
        options = self.cfg.trainer
        for first_alone in (self.world.once, lambda function: function()):
            first_alone(lambda: self.data.check(options.batch_size, options.lanes, self.layout.data_parallel))

    def _claim(self) -> Path | None:
        """Take the folder for this run alone, and find the checkpoint to go on from; by the first process."""
        if self.cfg.resume == "never" and (self.folder / "config.yaml").exists():
            raise ValueError(f"{self.folder} exists and resume=never: choose another run=<name>, or resume=auto")
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = (self.folder / ".lock").open("w")
        # A file server keeps the lock of a machine that was lost for a while, so that a job which was requeued waits.
        until = time.monotonic() + (LOCK_SECONDS if os.environ.get("SLURM_RESTART_COUNT") else 0.0)
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until:
                    raise ValueError(
                        f"another process trains run={self.cfg.run} just now: wait, or take another name"
                    ) from None
                time.sleep(1.0)
                continue
            except OSError:
                pass  # a file system without locks
            break
        self._lock = lock
        if resume_from := checkpoint.newest(self.folder / "checkpoints"):
            self._check_same(resume_from)
        return resume_from

    def _leave(self) -> None:
        """Give the folder, and the connection of the processes, back."""
        if self._lock:
            self._lock.close()
        self.watchdog.stop()
        self.world.leave()

    def _check_same(self, resume_from: Path) -> None:
        """See to it that what goes on is the same run."""
        path = self.folder / "config.yaml"
        try:
            before = OmegaConf.to_container(OmegaConf.load(path))
            changed = differences(before, self.resolved)
        except Exception as error:  # YAML and OmegaConf raise many kinds
            raise ValueError(f"{path} is damaged ({error}): restore it, or name this one run=<another name>") from error
        if changed:
            raise ValueError(
                f"the run {self.cfg.run} was begun with another configuration ({'; '.join(changed[:6])}): "
                "name this one run=<another name>, or give the same values to go on"
            )
        if (had := checkpoint.load_state(resume_from).get("teacher")) and had != taught_by(self.objective):
            raise ValueError(
                f"run={self.cfg.run} was begun with a teacher of other weights: name this one run=<another name>, or "
                "give the teacher's checkpoint of then, objective.teacher.step=<its step>"
            )
        if self.data.there and checkpoint.data_of(resume_from) != self._fingerprint():
            other = f", or latent.name={self.latent.name} has other weights" if self.latent.name else ""
            raise ValueError(
                f"data.path={self.cfg.data.path} holds other shards than those run={self.cfg.run} was begun with{other}"
            )
        if (step := checkpoint.step_of(resume_from)) > self.cfg.trainer.max_steps:
            raise ValueError(
                f"trainer.max_steps={self.cfg.trainer.max_steps}, but run={self.cfg.run} is at step {step}"
            )

    def _fingerprint(self) -> str:
        """What tells the training data, as the network sees them, from others."""
        return self.data.fingerprint() + (f" {self.encoder['sha256'][:16]}" if self.encoder else "")

    def prepare(self) -> None:
        """Pack the data where they are not there yet, and check them then.

        Raises:
            ValueError: if they do not do.
        """
        if not self.world.once(lambda: self.data.there):
            self.world.once(self.data.prepare)
            self._check_data()

    def fit(self) -> int | None:
        """Train to the end, evaluate, and write summary.json.

        Returns:
            The exit code if a signal ended the run early, or None.
        """
        try:
            before = self.world.once(lambda: summary_of(self.folder))
            has_figures = bool(before.keys() - PROGRESS) or not self.cfg.metric
            if before.get("step") == self.step == self.cfg.trainer.max_steps and has_figures:
                self.world.say(f"dit: {self.folder} is complete at step {self.step}")
                if self.world.is_first:
                    _report(self.folder, before)
                return None
            about, poison = gathered(self.world, self.device), self.cfg.trainer.poison_step
            with Attempts(self.folder, self.world, self.clock, self.step, poison, about) as self.attempts:
                self.attempts.code = self._begin() or 0
            return self.attempts.code or None
        except RuntimeError as error:
            if self.world.size > 1 and is_connection(error):
                who = self.watchdog.culprit() or "another process is gone, or does not answer"
                raise Lost(f"{who} ({' '.join(str(error).split())[:160]})") from error
            raise
        finally:
            self._leave()

    def _begin(self) -> int | None:
        """Say what is trained, and train; the exit code if a signal came."""
        self.prepare()
        batch, devices = self.cfg.trainer.batch_size, self.layout.data_parallel
        parts = devices * self.num_micro_batches
        among = [f"{devices} devices"] if devices > 1 else []
        among += [f"{self.num_micro_batches} parts"] if self.num_micro_batches > 1 else []
        among += [f"{batch // parts} images"] if among else []
        on = f" on {self.world.size} devices ({self.layout.name})" if self.world.size > 1 else ""
        some = f", {self.num_trained:,} of them trained" if self.parts.adapter else ""
        self.world.say(
            f"dit: {self.folder}: {f'going on from step {self.step}' if self.step else 'a new run'}, "
            f"{self.num_parameters:,} parameters{some}, {self.cfg.trainer.max_steps} steps of {batch} images"
            f"{' = ' + ' x '.join(among) if among else ''}, lr {self.cfg.optimizer.lr:g}{on}"
        )
        self.world.once(self._prepare_folder)
        return self._train()

    def _prepare_folder(self) -> None:
        """Make room for what the run leaves."""
        for name in ("samples", "checkpoints"):
            (self.folder / name).mkdir(exist_ok=True)
        checkpoint.clean(self.folder / "checkpoints", self.resume_from)
        rewound(self.folder / "skipped.jsonl", self.step)
        path = self.folder / "config.yaml"
        try:
            judged.rewind(self.folder / "evaluation.jsonl", self.step)
            replace(path, OmegaConf.to_yaml(OmegaConf.create(self.resolved)))
        except OSError as error:  # a full disk does not stop what was begun before
            if not path.exists():
                raise
            print(f"dit: WARNING: {error}; the run goes on", flush=True)
        lineage.note_used(self.folder, self.resolved, self._fingerprint())

    def _train(self) -> int | None:
        from lightning.pytorch import Trainer
        from lightning.pytorch.callbacks import LambdaCallback

        from dit.train.callbacks import Checkpoints, Figures, Preview, Recorder, Skips
        from dit.train.ledger import Ledger
        from dit.train.module import DiffusionModule
        from dit.train.preemption import Preemption, end_of_job

        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        warnings.filterwarnings(
            "ignore", message=".*(LeafSpec|num_workers|in eval mode|configure_optimizers|`srun` command).*"
        )  # Lightning's, of no use to anyone here
        cfg, options = self.cfg, self.cfg.trainer
        if options.accelerator == "cpu" and "OMP_NUM_THREADS" not in os.environ:  # leave the data's workers their cores
            cores = len(os.sched_getaffinity(0)) // self.world.local_size
            torch.set_num_threads(max(1, cores - self.data.num_workers))
        module = DiffusionModule(
            self._denoiser,
            self.strategy,
            self.objective,
            self.parts.condition,
            self.latent,
            build(cfg.optimizer),
            build(cfg.learning_rate),
            build(cfg.ema),
            seed=cfg.seed,
            lanes=options.lanes,
            num_micro_batches=self.num_micro_batches,
            max_grad_norm=options.max_grad_norm,
            guard=build(cfg.guard),
            init=self.init,
        )
        self.init = None  # it may be large

        if not self.world.is_first:
            self.tracker = None
        if self.tracker:
            with unheard():  # its helper would die of a scheduler's signals
                self.tracker.start(self.folder, self.resolved, self.step)
        preemption = Preemption(self.world.is_first, end_of_job() if self.world.is_first else None)
        recorder = Recorder(
            self.folder / "metrics.jsonl",
            options.max_steps,
            options.batch_size,
            options.log_every_steps,
            self.world,
            self.attempts,
            lambda: self._left_out(module),
        )
        columns = min(10, self.parts.condition.sizes.get("num_classes", 10))
        preview_of = self._preview_of(columns)
        preview = Preview(
            self.folder / "samples",
            lambda: _shown(self._subject(module, trainer), preview_of, columns),
            columns,
            options.preview_every_steps,
            recorder,
            preemption,
        )
        few, every = cfg.evaluation.few_images, cfg.evaluation.every_steps
        figures = Figures(
            lambda: self._figures(module, trainer, recorder, few), every if self.judging else None, recorder
        )
        checkpoints = Checkpoints(
            self.folder / "checkpoints",
            self.resume_from,
            options.checkpoint_every_steps,
            options.keep_checkpoints,
            recorder,
            Skips(self.folder / "skipped.jsonl", recorder),
            preemption,
            self._fingerprint(),
            keep_every_steps=options.keep_every_steps,
            asynchronous=options.asynchronous_checkpoints,
            snapshot_every_steps=cfg.ema.get("snapshot_every_steps"),
        )
        trainer = Trainer(
            accelerator=options.accelerator,
            devices=self.world.local_size,
            num_nodes=self.world.num_nodes,
            **self._processes(),
            precision=options.precision,
            max_epochs=1,  # of the data's endless stream, cut to the steps that are left
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=self.folder,
            callbacks=[
                *([Ledger(self.folder / "ledger", self.attempts.number, recorder)] if options.ledger else []),
                recorder,
                checkpoints,  # before the preview, which may take long
                preview,
                figures,
                LambdaCallback(on_train_end=lambda *_: self._finish(module, trainer, recorder, preemption)),
            ],
        )
        # Lightning would wait for the device at each step to hear whether a signal came; `Preemption` listens.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        self.watchdog.start()
        share = {"rank": self.strategy.data_rank, "world_size": self.strategy.data_size}
        skip = {step - 1 for step in self.attempts.left_out}  # steps of data are counted from 0
        batches = self.data.batches(options.batch_size, cfg.seed, self.step, lanes=options.lanes, skip=skip, **share)
        number = options.max_steps - self.step - sum(self.step <= step < options.max_steps for step in skip)
        # Closing ends the data's workers, which leave signals to us, and a save that is under way.
        with preemption, closing(checkpoints), closing(batches):
            coming = transfers(itertools.islice(batches, number), self.device)
            trainer.fit(module, self.clock.fetched(coming))
        return preemption.exit_code

    def _processes(self) -> dict[str, Any]:
        """What Lightning is told of them: that they are there already; what is divided among them is our affair."""
        from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
        from lightning.pytorch.strategies import ModelParallelStrategy

        if not torch.distributed.is_initialized():
            return {"plugins": [LightningEnvironment()]}  # or it would guess, by what SLURM leaves in a shell
        together = ModelParallelStrategy(data_parallel_size=self.world.size, tensor_parallel_size=1)
        return {"strategy": together, "plugins": [TorchElasticEnvironment()], "use_distributed_sampler": False}

    def _left_out(self, module: "DiffusionModule") -> dict[str, int]:
        """Steps that were left out, and samples that could not be used, by all processes, as some may see the same."""
        replaced = self.world.total(self.data.replaced) // self.layout.tensor_parallel
        return {name: n for name, n in (("skipped", module.guard.skipped), ("replaced", replaced)) if n}

    def _preview_of(self, columns: int) -> Samples:
        """What previews are told: a class a column, four times, or if there is more, what the first samples are."""
        if set(self.parts.condition.fields) <= {"label"} and not self.parts.restores:
            return {"label": torch.arange(columns).repeat(4)}
        return self.data.read("held_out" if self.data.held_out else "train", most=4 * columns)

    @contextmanager
    def _as_sampled(self, module: "DiffusionModule", trainer: "Trainer") -> Iterator[None]:
        """What was trained as it is used: with the averaged weights, under the precision of training."""
        module.denoiser.eval()
        # Compiled units would be compiled anew for each size of a batch.
        eager = torch.compiler.set_stance("force_eager") if self.cfg.trainer.compile else nullcontext()
        try:
            with trainer.precision_plugin.forward_context(), module.strategy.lent(module), eager:
                yield
        finally:
            module.denoiser.train()

    def _subject(self, module: "DiffusionModule", trainer: "Trainer") -> Subject:
        """What was trained, as metrics judge it; a student in as many steps as it has learned so far."""
        within = partial(self._as_sampled, module, trainer)
        options = {"seed": self.cfg.seed, "batch_size": self.cfg.evaluation.batch_size, "within": within}
        if (num_steps := self._num_steps(module)) is not None:
            options["num_steps"] = num_steps
        return self.parts.subject(module.denoiser, module.latent, **options)

    def _num_steps(self, module: "DiffusionModule") -> int | None:
        """In how many steps a student is drawn; None: it is none."""
        few_step = self.objective.few_step(module.step)
        return few_step and few_step.nearest(self.cfg.sampler.num_steps)

    def _finish(
        self,
        module: "DiffusionModule",
        trainer: "Trainer",
        recorder: "Recorder",
        preemption: "Preemption",
    ) -> None:
        """Evaluate and sum up a run that reached its end."""
        summary: dict[str, Any] = {}
        if not preemption.agree(self.world.most):
            preemption.leave_at_once()
            summary = {
                "step": module.step,
                "loss": recorder.last.get("loss"),
                "images_per_second": round(recorder.images_per_second, 1),
                **recorder.beside(),
            }
            with self.clock.of("evaluation"):
                summary |= self._final_figures(module, trainer, recorder)
            if self.world.is_first:
                self.attempts.trained(module.step)  # what judging has taken, too
                if useful := goodput.of_run(self.folder)[0]:
                    summary["goodput"] = round(useful, 4)
                replace(self.folder / "summary.json", json.dumps(summary, indent=1) + "\n")
                lineage.note_made(self.folder, self.folder)
                _report(self.folder, summary)
        else:
            self.world.say(f"dit: stopped and saved at step {module.step}; the same command goes on from there")
        if self.tracker:
            self.tracker.finish()

    def _figures(
        self, module: "DiffusionModule", trainer: "Trainer", recorder: "Recorder", num_images: int
    ) -> dict[str, float]:
        """Those of the metrics, of so many samples; noted with all that moves them."""
        assert self.judging
        figures = self.judging(self._subject(module, trainer), num_images, self.cfg.evaluation.batch_size)
        if self.world.is_first:
            with recorder.forgiven():
                settings = self._settings(module, num_images)
                figures = judged.note(self.folder / "evaluation.jsonl", figures, settings)
        return figures

    def _settings(self, module: "DiffusionModule", num_images: int) -> dict[str, Any]:
        """All that moves the figures of so many samples, in the words of `dit evaluate`."""
        assert self.judging
        asked = {name: self.resolved[name] or {} for name in ("sampler", "grid", "guidance")}
        if (num_steps := self._num_steps(module)) is not None:
            asked["sampler"] = {**asked["sampler"], "num_steps": num_steps}
        asked |= {name: self.resolved[name] for name in ("run", "metric", "seed")}
        asked |= {"weights": averages(self.cfg)[0], "num_samples": num_images, "labels": "in_turn"}
        precision = PRECISION[self.cfg.trainer.precision]
        if (rounded := self.cfg.trainer.float8) != "none":
            precision = "float8" if rounded == "tensorwise" else "float8 emulated"
        asked |= {"batch_size": self.cfg.evaluation.batch_size, "precision": precision}
        digest = None
        if self.layout.strategy in ("single", "ddp"):
            with module.strategy.lent(module):
                digest = sha256(module.denoiser)
        return judged.settings(asked, self.judging, step=module.step, sha256=digest, device=self.device.type)

    def _final_figures(self, module: "DiffusionModule", trainer: "Trainer", recorder: "Recorder") -> dict[str, Any]:
        """What others need of it exported, and the figures of the metric."""
        with self._as_sampled(module, trainer):
            if self.world.is_first:
                self.parts.export(module.denoiser, self.data, self.folder)
        if not self.judging:
            return {}
        self.world.say(f"dit: judging {self.cfg.evaluation.num_images} samples")
        figures: dict[str, Any] = dict(self._figures(module, trainer, recorder, self.cfg.evaluation.num_images))
        num_steps = self._num_steps(module)
        return figures if num_steps is None else {**figures, "num_steps": num_steps}


def _shown(subject: Subject, samples: Samples, columns: int) -> Tensor:
    """What is drawn of samples, uint8 (N, C, H, W), each row below one of their images where those are restored."""
    drawn = subject.draw(samples)
    if not subject.restores:
        return drawn
    rows = zip(samples["image"].split(columns), drawn.split(columns), strict=True)
    return torch.cat([images for row in rows for images in row])


def _report(folder: Path, summary: dict[str, Any]) -> None:
    """Print where things are and how it went."""
    samples = sorted((folder / "samples").glob("step-*.png"))
    where = {
        "samples": samples[-1] if samples else None,
        "checkpoint": checkpoint.committed(folder / "checkpoints")[-1],
    }
    where |= {"metrics": folder / "metrics.jsonl", "summary": folder / "summary.json"}
    offline = sorted(folder.glob("wandb/*run-*"))
    where |= {"wandb": offline[-1]} if offline else {}
    where |= {name: value for name, value in summary.items() if name != "goodput"}
    for name, value in where.items():
        print(f"  {name:<18} {f'{value:.4g}' if isinstance(value, float) else value}")
    for line in goodput.of_run(folder)[1]:
        print(line)
