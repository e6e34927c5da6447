"""The step on a GPU, as far as a machine without one can tell: what waits for what."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit.noise.draw import Draw
from dit.train import run
from dit.train.build import Parts, build
from dit.train.callbacks import Recorder
from dit.train.goodput import Clock
from dit.train.module import DiffusionModule
from dit.train.run import Run
from dit.train.strategy import Strategy
from dit.train.transfer import Transfer, transfers
from dit.train.world import World


class Streams:
    """Stands for CUDA's streams, and notes what is launched on them, in order; copies end where they began."""

    def __init__(self, monkeypatch):
        self.log, self.copies = [], 0
        monkeypatch.setattr(torch.cuda, "stream", self._copies)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)

    @contextlib.contextmanager
    def _copies(self, stream):
        self.copies += 1
        self.log.append(f"copy {self.copies}")
        yield

    def record_event(self):
        return self.copies

    def wait_event(self, copy):
        self.log.append(f"wait for {copy}")


def test_each_batch_is_copied_while_the_step_before_computes(config, monkeypatch):
    """And a run has the numbers that it has without, stopped in the middle, too."""

    def lines(*overrides):
        cfg = config("trainer.ledger=true", "trainer.checkpoint_every_steps=3", "data.num_workers=1", *overrides)
        trained = Run(cfg)
        assert trained.fit() is None
        found = [json.loads(line) for line in (trained.folder / "ledger" / "rank-0.jsonl").read_text().splitlines()]
        return [(line["step"], line["keys"], line["loss"]) for line in found]

    plain = lines("run=plain", "trainer.max_steps=5")
    streams, step = Streams(monkeypatch), DiffusionModule.training_step

    def noted(module, batch, index):
        streams.log.append("step")
        return step(module, batch, index)

    cpu = torch.device("cpu")
    monkeypatch.setattr(run, "transfers", lambda batches, device: (Transfer(b, cpu, streams) for b in batches))
    monkeypatch.setattr(DiffusionModule, "training_step", noted)
    assert lines("run=ahead", "trainer.max_steps=3") == plain[:3]
    one, two, three = (["wait for 1", "step"], ["wait for 2", "step"], ["wait for 3", "step"])
    assert streams.log == ["copy 1", "copy 2", *one, "copy 3", *two, *three]
    assert lines("run=ahead", "trainer.max_steps=5") == plain


def test_on_a_cpu_nothing_is_copied():
    assert transfers(batches := iter([{}]), torch.device("cpu")) is batches


class GPU(TorchDispatchMode):
    """Within `fake`, whose tensors on a GPU have no contents: who asks for these is refused.

    Tensors of the CPU are as ever, and to one of them a copy that is not waited for never comes.

    Attributes:
        waits: the operations for which the host waits for the device, or for a copy to it.
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        devices = {torch.device(kwargs["device"]).type} if kwargs.get("device") else set()
        devices |= {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        if "cuda" not in devices:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default) and len(devices) > 1:
            if not (kwargs.get("non_blocking") or args[2:] == (True,)):
                self.waits.append(str(func))
            elif not isinstance(args[0], FakeTensor):
                return args[0]
        return func(*args, **kwargs)


def stepped(cfg, monkeypatch):
    """What the host waits for in a third step, as it would be on a GPU, but for the gradients, which are made up."""

    def backward(strategy, loss):
        for p in (p for g in strategy.optimizers["denoiser"].param_groups for p in g["params"]):
            p.grad = torch.zeros_like(p)

    monkeypatch.setattr(Strategy, "backward", backward)
    monkeypatch.setattr(Draw, "generator", lambda *_: torch.Generator())
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: None))
    parts, device, world, gpu = Parts(cfg), torch.device("cuda", 0), World(), GPU()
    with gpu.fake, gpu:
        module = DiffusionModule(
            lambda: parts.learner(device),
            Strategy(cfg.trainer, world, device),
            build(cfg.objective),
            parts.condition,
            parts.latent(),
            build(cfg.optimizer),
            build(cfg.learning_rate),
            build(cfg.ema),
            lanes=8,
            num_micro_batches=2,
            max_grad_norm=1.0,
            guard=build(cfg.guard),
        )
        module._device = device
        module.configure_model()
        module.on_fit_start()
        attempts = SimpleNamespace(clock=Clock(), passed_over=lambda step: step)
        recorder = Recorder(None, 100, 32, 10, world, attempts)
        recorder.on_train_start(None, module)
        batch = {"image": torch.zeros(32, 1, 8, 8, dtype=torch.uint8, device=device), "key": [""] * 32}
        batch["label"] = torch.zeros(32, dtype=torch.long, device=device)
        for index in range(3):  # the first brings tables to the device
            gpu.waits.clear()
            outputs = module.training_step(batch, index)
            recorder.on_train_batch_end(None, module, outputs, batch, index)
            module.guard.note(index, outputs["applied"], outputs["grad_norm"], outputs["loss"], batch["key"])
            list(module.guard.bad())
        assert outputs["loss"].is_cuda and module.guard._usual["denoiser"].is_cuda
        return gpu.waits


def test_the_host_does_not_wait_for_a_step(config, monkeypatch):
    """With guard, averages, clipping, micro-batches and sums of the loss; where a line is due it does, and by a ledger.

    An optimizer that is not told on the device whether to step has to wait.
    """
    assert stepped(config("ema=power"), monkeypatch) == []
    with pytest.raises(DataDependentOutputException):
        stepped(config("optimizer.fused=false"), monkeypatch)
