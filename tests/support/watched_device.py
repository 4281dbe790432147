"""A device made of host memory that notices every wait of the host for it: what a GPU stalls on, counted without one.

    python tests/support/watched_device.py cases.json OUT

Tensors of the device ``watched`` wrap host tensors; every operator on them runs on the host. Like a GPU the device
works on its own until the host asks for a value: reading one, moving a tensor off the device, moving one onto it from
memory that is not pinned (CUDA may stage it in step with the stream), and operators whose result has a size that only
the device knows. Mixing devices in one operator raises, as on a GPU.

For each case (as in ``meta_step_worker.py``) ``OUT/<name>.json`` gets the waits of the last meta-step as
(operator, place in the code, phase); the phase is ``inner`` inside the passes of the tasks, ``outer`` around them.
``OUT/reduction.json`` says where tensors of both sides are reduced.

torch allows one such device per process, hence the process of its own.
"""

import contextlib
import json
import math
import os
import sys
import traceback
from pathlib import Path

import torch
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

DEVICE = torch.device("cpu")  # replaced by register()
READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim", "_unique2", "bincount"}
"""Operators whose result, or the size of it, the host has to ask for."""

waits: list[tuple[str, str]] = []


class Watched(torch.Tensor):
    """A tensor of the device; ``raw`` is the host tensor behind it."""

    @staticmethod
    def __new__(cls, raw):
        return torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=DEVICE
        )

    def __init__(self, raw):
        self.raw = raw

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, *args, **(kwargs or {}))


def _run(func, *args, **kwargs):
    name = func._schema.name.removeprefix("aten::")
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    host = [t for t in tensors if not isinstance(t, Watched)]
    target = kwargs.get("device")
    stays = target is None or torch.device(target).type == DEVICE.type
    if name in READS or _has_mask_index(name, args) or _asks_for_size(name, args, kwargs):
        _note(name)
    if name == "copy_":
        onto_device = isinstance(args[0], Watched)
        other = args[1] if onto_device else args[0]
        if host and not (
            onto_device and getattr(other, "is_pinned_for_watched", False) and _non_blocking(args, kwargs)
        ):
            _note("copy_")
    elif any(t.ndim for t in host):
        if not name.startswith("index"):
            raise RuntimeError(f"{name}: tensors on {DEVICE} and on the host")
        _note(f"{name} with an index on the host")
    if not stays:
        _note(f"{name} to {target}")
    elif target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    raw_args, raw_kwargs = tree_map_only(Watched, lambda t: t.raw, (args, kwargs))
    result = func(*raw_args, **raw_kwargs)
    if not stays or name == "_local_scalar_dense":
        return result
    wrapped = tree_map(lambda leaf: Watched(leaf) if isinstance(leaf, torch.Tensor) else leaf, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _non_blocking(args, kwargs):
    return kwargs.get("non_blocking", args[2] if len(args) > 2 else False)


def _has_mask_index(name, args):
    if not name.startswith("index") or len(args) < 2 or not isinstance(args[1], list | tuple):
        return False
    return any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1])


def _asks_for_size(name, args, kwargs):
    return name == "repeat_interleave" and kwargs.get("output_size") is None


def _note(what):
    frames = [f for f in traceback.extract_stack() if str(ROOT) in f.filename or "/verl/" in f.filename]
    frames = [f for f in frames if not f.filename.startswith(__file__) and "/torch/" not in f.filename]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "?"
    waits.append((what, where))


def register() -> None:
    """Make the device known to torch, and the one that veRL works on."""
    global DEVICE
    module = _DummyBackendModule()
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    module.synchronize = lambda *_: _note("synchronize")
    _setup_privateuseone_for_python_backend("watched", module)
    DEVICE = torch.device("watched", 0)
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda func, *args, **kwargs: _run(func, *args, **kwargs), "PrivateUse1")
    globals()["_library"] = library  # torch forgets what it registered once it is gone

    def pin_memory(tensor, device=None):
        pinned = tensor.clone()
        pinned.is_pinned_for_watched = True
        return pinned

    torch.Tensor.pin_memory = pin_memory
    # transformers loads models under a device context, which keeps the constructors that it first sees. With the one
    # below it would take the model's device for the host's, and leave buffers uninitialised.
    _device_constructors()
    make = torch.tensor

    def tensor(data, *, device=None, **kwargs):
        made = make(data, **kwargs)
        return made if device is None else made.to(device)

    torch.tensor = tensor  # its own copy to the device goes past the operators

    from verl.plugin.platform import set_platform

    from metasft.backend.cpu_platform import PlatformCPU
    from metasft.model import packed_attention

    class PlatformWatched(PlatformCPU):
        @property
        def device_name(self):
            return "watched"

        def current_device(self):
            return DEVICE

    set_platform(PlatformWatched())
    # torch's own chooses a kernel by the kind of device, and knows none for this one.
    packed_attention.scaled_dot_product_attention = _attention


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) if groups > 1 else t for t in (key, value))
    scores = query @ key.transpose(-1, -2) * (scale or 1 / math.sqrt(query.shape[-1]))
    if is_causal:
        attn_mask = torch.full(scores.shape[-2:], float("-inf"), device=scores.device).triu(1)
    if attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value


def run_case(case: dict, out: Path) -> None:
    from meta_step_worker import build_trainer

    trainer = build_trainer(case["script"], case["config"], case["overrides"])
    phase = "outer"
    found: list[tuple[str, str, str]] = []

    def inside(function):
        def wrapped(*args, **kwargs):
            nonlocal phase
            collect()
            phase = "inner"
            try:
                return function(*args, **kwargs)
            finally:
                collect()
                phase = "outer"

        return wrapped

    def collect():
        found.extend((*wait, phase) for wait in waits)
        waits.clear()

    for name in ("adapt", "query_backward", "backward_through", "measure_before", "measure_after"):
        setattr(trainer.episodes, name, inside(getattr(trainer.episodes, name)))
    for step in range(1, case.get("steps", 1) + 1):
        waits.clear()
        found.clear()
        metrics, _ = trainer.train_step(step)
        collect()
    (out / f"{case['name']}.json").write_text(json.dumps({"waits": found, "metrics": metrics}))


def reduce_across_devices(out: Path) -> None:
    """all_reduce_flat over tensors on the host (as shards are under engine.offload_policy) and on the device."""
    import torch.distributed as dist

    from metasft.backend.engine import all_reduce_flat

    original, places = dist.all_reduce, []

    def all_reduce(tensor, **_):
        places.append(tensor.device.type)
        tensor.mul_(2)  # as if another rank had the same

    dist.all_reduce = all_reduce
    try:
        shard, table = torch.arange(3.0), torch.ones(2).to(DEVICE)
        all_reduce_flat([shard, table], dist.group.WORLD)
        found = {"places": places, "shard": shard.tolist(), "table": table.tolist(), "table_on": table.device.type}
    except RuntimeError as error:
        found = {"error": str(error)}
    finally:
        dist.all_reduce = original
    (out / "reduction.json").write_text(json.dumps(found))


def main() -> None:
    os.environ |= {"VERL_PLATFORM": "cpu", "CUDA_VISIBLE_DEVICES": ""}  # the host memory of a GPU machine will do, too
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    from verl.utils.distributed import initialize_global_process_group

    from metasft.training import launch

    launch._single_process_defaults()
    with contextlib.redirect_stdout(sys.stderr):
        initialize_global_process_group()
        register()
        for case in cases:
            run_case(case, out)
        reduce_across_devices(out)


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
