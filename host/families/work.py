"""What a model's calls cost in operations, whole and cut, counted on a twin of it that has no weights.

The twin is built from the model's own configuration on torch's meta device, where tensors have a shape and nothing
else: counting needs no memory and no device, and gives the same whatever computes the products of the real one.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.ops
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import flop_registry

from .split_points import SplitPoint, split_point_of

META = torch.device("meta")
DEEPEST = 12
"""Blocks at either end that may be computed in every call: more of them save too little."""
FORMULAS = {**flop_registry, torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm],
            torch.ops.aten.baddbmm_: flop_registry[torch.ops.aten.baddbmm]}
"""What is counted: torch's own list leaves out products that are added in place, as those of LoRAs are."""
_KNOWN: WeakKeyDictionary[nn.Module, dict[tuple, Work | str]] = WeakKeyDictionary()
_OF_OTHERS = ("patches", "patches_replace", "wrappers", "callbacks", "context_window")


@dataclass(frozen=True)
class Work:
    """Operations of a call: of layers, convolutions and attention, two for each multiply-add.

    whole   of the whole model
    cut     per depth that the model can be cut at: of the layers that are computed then
    """

    whole: int
    cut: Mapping[int, int]

    @property
    def shares(self) -> dict[int, float]:
        """Per depth the operations of a call that is cut there, as a share of those of a whole one."""
        return {depth: operations / self.whole for depth, operations in self.cut.items()}


def work_of(model, root: nn.Module, x: Tensor, t: Tensor, c_concat: Tensor | None, context: Tensor | None,
            options: dict, conds: Mapping) -> Work | str:
    """The work of a call of `model`, ComfyUI's BaseModel around the diffusion model `root`, with what its
    `apply_model` is given; or why it cannot be told. LoRAs, ControlNets and what other nodes put in are not counted."""
    if isinstance(reason := split_point_of(root, 1), str):
        return f"{type(root).__name__}: {reason}"
    values, form = tree_flatten((x, c_concat, context, dict(conds)))
    shapes = form, tuple(tuple(value.shape) if isinstance(value, Tensor) else
                         value if isinstance(value, str | int) else None for value in values)
    known = _KNOWN.setdefault(root, {})
    if shapes not in known:
        try:
            twin = type(root)(**model.model_config.unet_config | {"dtype": torch.float32}, device=META,
                              operations=comfy.ops.disable_weight_init).eval()
            known[shapes] = _counted(twin, *_arguments(model, twin, x, t, c_concat, context, options, conds))
        except (comfy.model_management.InterruptProcessingException, comfy.model_management.OOM_EXCEPTION):
            raise  # these say nothing of the model, and must not be remembered of it
        except Exception as error:  # whatever a model's own code does on tensors without numbers
            known[shapes] = f"the operations of {type(root).__name__} cannot be counted: {error or repr(error)}"
    return known[shapes]


class _Called(Exception):  # noqa: N818  (no error: the way out of the model's preparation)
    pass


def _arguments(model, twin: nn.Module, x: Tensor, t: Tensor, c_concat: Tensor | None, context: Tensor | None,
               options: dict, conds: Mapping) -> tuple[tuple, dict]:
    """What the model makes of its inputs before it calls its diffusion model, without their numbers."""
    def called(*args, **kwargs):
        raise _Called(args, kwargs)

    shadow = copy.copy(model)
    shadow._modules = {**model._modules, "diffusion_model": twin}
    twin.forward = called
    try:
        shadow._apply_model(x, t, c_concat, context, None, options, **conds)
    except _Called as found:
        args, kwargs = found.args
    finally:
        del twin.forward

    def bare(value):
        if not isinstance(value, Tensor):
            return value
        return torch.empty(value.shape, dtype=torch.float32 if value.is_floating_point() else value.dtype, device=META)

    rest = {key: value for key, value in kwargs.pop("transformer_options").items() if key not in _OF_OTHERS}
    args, kwargs, rest = tree_map(bare, (args, kwargs, rest))
    return args, {**kwargs, "transformer_options": {**rest, "optimized_attention_override": _attention}}


def _attention(_, *args, **kwargs) -> Tensor:
    """One that computes on any device, where others ask how much memory it has."""
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


class Operations(TorchDispatchMode):
    """Counts what is computed while it is open, in all and within the calls of some modules; torch's own counter
    follows all modules and takes twenty times as long.

    total    operations so far
    within   per module the same, of its own calls
    """

    def __init__(self, modules: Sequence[nn.Module] = ()):
        super().__init__()
        self.total, self.within = 0, Counter()
        self._since: dict[nn.Module, int] = {}
        for module in modules:  # of a twin, which nobody needs afterwards
            module.register_forward_pre_hook(self._enter)
            module.register_forward_hook(self._leave)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs, known = kwargs or {}, FORMULAS.get(op._overloadpacket)
        if known is None:  # made of others, as layers are
            with self:
                made = op.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        out = op(*args, **kwargs)
        self.total += known(*args, **kwargs, out_val=out) if known is not None else 0
        return out

    def _enter(self, module: nn.Module, _) -> None:
        self._since[module] = self.total

    def _leave(self, module: nn.Module, *_) -> None:
        self.within[module] += self.total - self._since[module]


def _counted(twin: nn.Module, args: tuple, kwargs: dict) -> Work:
    splits: dict[int, SplitPoint] = {}
    for depth in range(1, DEEPEST + 1):
        split = split_point_of(twin, depth)
        if isinstance(split, str):
            break
        splits[depth] = split
    with torch.inference_mode(), Operations(splits[1].deep) as counted:
        twin(*args, **kwargs)
    return Work(counted.total, {depth: counted.total - sum(counted.within[module] for module in split.deep)
                                for depth, split in splits.items()})
