"""What tests of checkpoints do in other processes, which begin with torch already imported."""

import io
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback

import torch
import torch.distributed as dist
from torch import nn

from dit.train import checkpoint

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["dit.train.checkpoint", "torch.distributed.fsdp"])


def tensors(step, size=40_000):
    """Groups of tensors that tell the step."""
    generator = torch.Generator().manual_seed(step)
    weights = {f"{i}.weight": torch.randn(size, generator=generator) for i in range(8)}
    return {"model": weights, "optimizer": {"0.weight/step": torch.tensor(float(step))}}


def ranks(number, function, *arguments):
    """What a function (rank, *arguments) returns in each of so many processes of one group."""
    with tempfile.TemporaryDirectory() as folder:
        queue = processes.SimpleQueue()
        asked = [(rank, number, f"{folder}/store", queue, function, arguments) for rank in range(number)]
        children = [processes.Process(target=_rank, args=each, daemon=True) for each in asked]
        for child in children:
            child.start()
        found = dict(queue.get() for _ in children)
        for child in children:
            child.join()
    problems = [value for value in found.values() if isinstance(value, str) and value.startswith("Traceback")]
    assert not problems, problems[0]
    return [found[rank] for rank in range(number)]


def _rank(rank, number, store, queue, function, arguments):
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=number)
        queue.put((rank, function(rank, *arguments)))
        dist.destroy_process_group()
    except BaseException:
        queue.put((rank, traceback.format_exc()))
        raise


def save_until(root, point):
    """Save step 2 over step 1, and SIGKILL oneself at a point of it; with point 0, exit with the number of points.

    Points are the calls that change or sync a file, and the tensors written.
    """
    checkpoint.Saver(root.parent / f"warm-{os.getpid()}").save(1, tensors(1, 10), {}, wait=True)
    count = 0

    def pass_by():
        nonlocal count
        count += 1
        if count == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def passing(function):
        def call(*args, **kwargs):
            pass_by()
            result = function(*args, **kwargs)
            pass_by()
            return result

        return call

    os.fsync, torch.save = passing(os.fsync), passing(torch.save)
    changes = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}
    sys.addaudithook(
        lambda event, args: pass_by() if event in changes or (event == "open" and str(root) in str(args[0])) else None
    )
    saver = checkpoint.Saver(root, keep=1)
    saver.save(2, tensors(2), {"step": 2})
    saver.wait()
    os._exit(count)


def save_forever(root, size, ready):
    """Save step 2, 3, ... until killed."""
    saver = checkpoint.Saver(root, keep=1)
    step = 1
    while True:
        step += 1
        saver.save(step, tensors(step, size), {"step": step})
        ready.set()


class Counting(torch.optim.AdamW):
    """An optimizer that keeps what is no tensor."""

    def step(self, closure=None):
        loss = super().step(closure)
        for state in self.state.values():
            state["count"] = 1
        return loss


def network(seed, device="cpu"):
    """Layers whose sizes four ranks do not divide."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.SiLU(), nn.Linear(6, 3)).to(device)


def stepped(net, optimizer):
    """One step, the same on all ranks."""
    net(torch.linspace(-1, 1, 20).view(4, 5)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def groups(net, optimizer, average):
    """What a checkpoint has of them."""
    names = {p: name for name, p in net.named_parameters()}
    state = {f"{names[p]}/{key}": value for p, kept in optimizer.state.items() for key, value in kept.items()}
    return {"model": net.state_dict(), "ema": average, "optimizer": state}


def trained(seed, shard):
    """A network, sharded by a function, its optimizer and its average, after two steps."""
    net = shard(network(seed))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    stepped(net, optimizer)
    average = {name: p.detach().clone() for name, p in net.named_parameters()}
    stepped(net, optimizer)
    return groups(net, optimizer, average)


def sharded(net):
    """FSDP2 over all ranks."""
    from torch.distributed.fsdp import fully_shard

    return fully_shard(net, mesh=dist.init_device_mesh("cpu", (dist.get_world_size(),)))


def hybrid(net):
    """FSDP2 that shards in pairs and replicates these."""
    from torch.distributed.fsdp import fully_shard

    return fully_shard(net, mesh=dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards")))


def parallel(net):
    """Tensor parallel in pairs, FSDP2 across these."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(net, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return fully_shard(net, mesh=mesh["data"])


def replicated(net):
    """As DDP has it."""
    return net


def save_sharded(rank, root, shard, asynchronous=True):
    """Save what was trained; the number of elements of it that this rank has."""
    found = trained(0, shard)
    saver = checkpoint.Saver(root, asynchronous=asynchronous)
    saver.save(2, found, {"step": 2})
    saver.wait()
    return sum(checkpoint._part(value).numel() for value in found["model"].values())


def load_sharded(rank, path, shard):
    """Load into other numbers; whether all are then those of the checkpoint, bit by bit."""
    found = trained(1, shard)
    checkpoint.load_into(path, found)
    for group, values in found.items():
        expected = checkpoint.load_weights(path, group)
        assert values.keys() == expected.keys()
        for name, value in values.items():
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            assert torch.equal(whole, expected[name]), name
    return True


def save_with_a_full_disk(rank, root):
    """Save three times, the second with no space on the last rank; the problems as this rank knows them, its output."""
    saver = checkpoint.Saver(root, keep=5)
    problems = []
    sys.stdout = io.StringIO()
    sync = os.fsync
    for step in (1, 2, 3):
        if step == 2 and rank == dist.get_world_size() - 1:
            os.fsync = full
        saver.save(step, tensors(step, 100), {"step": step})
        saver.wait()
        os.fsync = sync
        problems.append(saver.problem)
    return problems, sys.stdout.getvalue()


def full(*_):
    raise OSError(28, "No space left on device")
