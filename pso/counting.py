"""What a piece of code does, counted and not timed: the same on every machine.

    with counted(pipeline) as counts:
        ...
    counts.host_syncs

UNet calls with the adapter on (theta) and off or absent (pre), FLOPs, pictures through the VAE, prompts through the
text encoders, models loaded, bytes kept for the backward pass, ATen operations, and host syncs: reads of a number that
the networks' weights have a part in, for which a GPU's host would have to wait.

Host syncs are told on a CPU by following the weights: what is computed from something followed is followed too, and a
read of it counts. So step counters, tables of the sampler and other data of the host are no syncs. On a GPU torch
itself tells (torch.cuda.set_sync_debug_mode), of any tensor there.
"""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, ModelMixin, UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import CLIPTextModelWithProjection, PreTrainedModel

aten = torch.ops.aten


@dataclass
class Counts:
    """`saved_bytes`: the most that was kept for the backward pass at one time, weights aside, a storage once. What a
    checkpoint forms again in the backward pass is not in it."""

    theta_calls: int = 0
    theta_rows: int = 0
    pre_calls: int = 0
    pre_rows: int = 0
    flops: int = 0
    pictures_decoded: int = 0
    pictures_encoded: int = 0
    prompts_encoded: int = 0
    model_loads: int = 0
    host_syncs: int = 0
    saved_bytes: int = 0
    operations: int = 0

    @property
    def unet_calls(self) -> int:
        return self.theta_calls + self.pre_calls


@contextlib.contextmanager
def counted(pipeline) -> Iterator[Counts]:
    """Of everything inside the block. pipeline: of diffusers; the networks whose weights are followed."""
    networks = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    found, kept = Counts(), Kept(networks)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_calls(found))
        stack.enter_context(_pictures(found))
        stack.enter_context(_loads(found))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda held: held.tensor))
        flops = stack.enter_context(FlopCounterMode(display=False, custom_mapping=ON_CPU))
        operations = stack.enter_context(Operations())
        syncs = stack.enter_context(syncs_on_gpu() if _on_gpu(networks) else syncs_on_cpu(networks))
        yield found
    found.flops, found.operations = flops.get_total_flops(), operations.count
    found.host_syncs, found.saved_bytes = syncs.count, kept.most


def _on_gpu(networks: list[nn.Module]) -> bool:
    return any(p.is_cuda for network in networks for p in network.parameters())


def _attention(query, key, value, *more, **named) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad_out, query, key, value, *more, **named) -> int:
    return sdpa_backward_flop_count(grad_out, query, key, value)


# of shapes; torch itself counts the attention kernels of GPUs alone
ON_CPU = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


# ---- calls ----


def adapter_on(network: nn.Module) -> bool:
    """Whether a LoRA takes part in a call."""
    return any(isinstance(m, BaseTunerLayer) and not m.disable_adapters for m in network.modules())


@contextlib.contextmanager
def _calls(found: Counts) -> Iterator[None]:
    def before(module: nn.Module, arguments: tuple) -> None:
        if isinstance(module, UNet2DConditionModel):
            kind = "theta" if adapter_on(module) else "pre"
            setattr(found, f"{kind}_calls", getattr(found, f"{kind}_calls") + 1)
            setattr(found, f"{kind}_rows", getattr(found, f"{kind}_rows") + len(arguments[0]))
        elif isinstance(module, CLIPTextModelWithProjection):  # SDXL's second; the first sees the same prompts
            found.prompts_encoded += len(arguments[0])

    hook = register_module_forward_pre_hook(before)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def _replaced(owner: object, name: str, by: Callable) -> Iterator[None]:
    own = vars(owner).get(name)
    setattr(owner, name, by)
    try:
        yield
    finally:
        delattr(owner, name) if own is None else setattr(owner, name, own)


@contextlib.contextmanager
def _pictures(found: Counts) -> Iterator[None]:
    encode, decode = AutoencoderKL.encode, AutoencoderKL.decode

    def encoding(vae, x, *more, **named):
        found.pictures_encoded += len(x)
        return encode(vae, x, *more, **named)

    def decoding(vae, z, *more, **named):
        found.pictures_decoded += len(z)
        return decode(vae, z, *more, **named)

    with _replaced(AutoencoderKL, "encode", encoding), _replaced(AutoencoderKL, "decode", decoding):
        yield


@contextlib.contextmanager
def _loads(found: Counts) -> Iterator[None]:
    """Weights that are read from files, or copied: from_pretrained, from_config with a state dict put in, deepcopy of
    a UNet."""
    whole, loading, read = copy.deepcopy, nn.Module.load_state_dict, PreTrainedModel.__dict__["from_pretrained"]

    def copied(value, *more, **named):
        found.model_loads += isinstance(value, UNet2DConditionModel)
        return whole(value, *more, **named)

    def loaded(module, *more, **named):
        found.model_loads += isinstance(module, ModelMixin | PreTrainedModel)
        return loading(module, *more, **named)

    def from_pretrained(cls, *more, **named):
        found.model_loads += 1
        return read.__func__(cls, *more, **named)

    with (
        _replaced(copy, "deepcopy", copied),
        _replaced(nn.Module, "load_state_dict", loaded),
        _replaced(PreTrainedModel, "from_pretrained", classmethod(from_pretrained)),
        _replaced(ModelMixin, "from_pretrained", _diffusers_loader(found)),
    ):
        yield


def _diffusers_loader(found: Counts):
    read = ModelMixin.__dict__["from_pretrained"]

    def from_pretrained(cls, *more, **named):
        found.model_loads += 1
        return read.__func__(cls, *more, **named)

    return classmethod(from_pretrained)


class Operations(TorchDispatchMode):
    """Every ATen operation, of forward and backward pass."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


# ---- what is kept for the backward pass ----


class Kept:
    """Bytes of the storages that are held at the moment, and the most that they were."""

    def __init__(self, networks: list[nn.Module]):
        self.weights = {p.untyped_storage().data_ptr() for n in networks for p in (*n.parameters(), *n.buffers())}
        self.holders: dict[int, int] = {}  # address of a storage -> how many hold it
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> "Held":
        return Held(self, tensor)

    def add(self, address: int, size: int) -> None:
        self.holders[address] = self.holders.get(address, 0) + 1
        if self.holders[address] == 1:
            self.now += size
            self.most = max(self.most, self.now)

    def drop(self, address: int, size: int) -> None:
        self.holders[address] -= 1
        if not self.holders[address]:
            del self.holders[address]
            self.now -= size


class Held:
    """A tensor that autograd keeps, as long as it does."""

    def __init__(self, kept: Kept, tensor: Tensor):
        self.tensor, storage = tensor, tensor.untyped_storage()
        self.place = (storage.data_ptr(), storage.nbytes())
        self.kept = None if self.place[0] in kept.weights else kept
        if self.kept is not None:
            self.kept.add(*self.place)

    def __del__(self):
        if getattr(self, "kept", None) is not None:
            self.kept.drop(*self.place)


# ---- host syncs ----

READS = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default}
READS |= {aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default}
MASKED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}  # by a mask: how many, is asked first
TRANSFERS = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.cpu}


class Followed:
    """Storages that the weights have a part in. A weak reference keeps the storage's address from being used again,
    and none of its bytes."""

    def __init__(self, networks: list[nn.Module]):
        self.storages: dict[int, StorageWeakRef] = {}
        self.count = 0
        for network in networks:
            self.add([*network.parameters(), *network.buffers()])

    def add(self, values: object) -> None:
        for tensor in _tensors(values):
            reference = StorageWeakRef(tensor.untyped_storage())
            self.storages.setdefault(reference.cdata, reference)

    def any(self, values: object) -> bool:
        return any(tensor.untyped_storage()._cdata in self.storages for tensor in _tensors(values))


def _tensors(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class _Reads(TorchDispatchMode):
    def __init__(self, followed: Followed):
        super().__init__()
        self.followed = followed

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        known = self.followed.any((args, kwargs))
        if known and (func in READS or (func in MASKED and _by_mask(args, self.followed))):
            self.followed.count += 1
        found = func(*args, **kwargs)
        if known:
            # what an operation writes into is followed too
            self.followed.add((found, args[0] if func._schema.is_mutable and args else None, kwargs.get("out")))
        return found


def _by_mask(args: tuple, followed: Followed) -> bool:
    masks = [t for t in _tensors(args[1]) if t.dtype in (torch.bool, torch.uint8)]
    return bool(masks) and followed.any(masks)


class _Transfers(TorchFunctionMode):
    """Reads that a CPU does without an operation."""

    def __init__(self, followed: Followed):
        super().__init__()
        self.followed = followed

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in TRANSFERS or not self.followed.any(args):
            return func(*args, **kwargs)
        self.followed.count += 1
        if func is Tensor.cpu:
            return _on_the_host(args[0])
        return func(*args, **kwargs)


def _on_the_host(tensor: Tensor) -> Tensor:
    """A copy that is followed no more, as the one that a GPU would give."""
    with torch._C._DisableTorchDispatch():
        return tensor.clone()


@contextlib.contextmanager
def syncs_on_cpu(networks: list[nn.Module]) -> Iterator[Followed]:
    followed = Followed(networks)
    with _Reads(followed), _Transfers(followed):
        yield followed


@dataclass
class Told:
    count: int = 0


@contextlib.contextmanager
def syncs_on_gpu() -> Iterator[Told]:
    """By torch's own warnings, of which every one is let through."""
    found, before = Told(), torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
            found.count = sum("synchronizing CUDA operation" in str(one.message) for one in said)
