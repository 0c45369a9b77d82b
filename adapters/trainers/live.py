"""The policy inside a running trainer: found, checked, and temporarily in evaluation mode."""

import random
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import is_compiled_module
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from transformers import GenerationConfig, PreTrainedModel

from funcprobe import tree
from funcprobe.policy.forward import trainable_params
from funcprobe.policy.suitability import causal_lm, require_causal_lm
from funcprobe.types import AdamState, InputError, Params

from ..checkpoint.model import Policy, check_registry, eos_ids_of
from ..machine.devices import random_state_kept
from ..optimizer import live_adam_state

_ABSENT = object()


def policy_of(model: Any) -> Any:
    """The trained module without the wrappers of DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif is_compiled_module(model):
            model = model._orig_mod
        else:
            return model


def plain_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer without accelerate's wrapper."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer  # type: ignore[no-any-return]


def tokenizer_of(trainer: Any) -> Any:
    """The trainer's tokenizer. InputError if it has none."""
    processing = trainer.processing_class
    tokenizer = getattr(processing, "tokenizer", processing)
    if not hasattr(tokenizer, "eos_token_id"):
        raise InputError(
            "the trainer has no tokenizer, which prompts and responses need: give a processing_class"
        )
    return tokenizer


def live_policy(trainer: Any, max_trainable: int) -> Policy:
    """The trained policy as a `Policy`; nothing is copied.

    InputError, one line, for a model that is neither a causal language model with a LoRA adapter of
    peft nor one that is trained itself.
    """
    model, tokenizer = policy_of(trainer.model), tokenizer_of(trainer)
    full = not isinstance(model, PeftModel)
    if full and any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise InputError(
            f"the trainer's model is {type(model).__name__} with layers of an adapter, but not a LoRA "
            "policy of peft: give a peft_config, or the model returned by get_peft_model()"
        )
    if full and not isinstance(model, PreTrainedModel):
        raise InputError(
            f"the trainer's model is {type(model).__name__}: a causal language model of transformers, "
            "or the model returned by get_peft_model(), is expected"
        )
    require_causal_lm(model)
    params = trainable_params(model)
    check_registry(params, max_trainable, full=full)
    base: Any = causal_lm(model)
    eos_ids = tuple(getattr(trainer, "eos_token_ids", None) or eos_ids_of(tokenizer, base))
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos_ids[0]
    attention = str(base.config._attn_implementation)
    name = str(base.config._name_or_path)
    return Policy(model, tokenizer, params, eos_ids, pad_id, name, None, attention, ())


def require_live(trainer: Any, optimizer: torch.optim.Optimizer) -> None:
    """InputError, one line, if gradients and state of this process do not determine the step.

    That is, for sharded models, gradients scaled for float16, optimizers other than AdamW of torch and
    of bitsandbytes (a subclass may take another step), and hooks on the optimizer's step.
    """
    accelerator = trainer.accelerator
    kind = accelerator.distributed_type.value
    sharded = [n for n, p in policy_of(trainer.model).named_parameters() if isinstance(p, DTensor)]
    if kind in {"FSDP", "DEEPSPEED", "MEGATRON_LM"} or sharded:
        found = kind if not sharded else f"{kind}, {sharded[0]} is a DTensor"
        raise InputError(
            f"the model is sharded ({found}), so that no process has the whole gradient: probe the "
            "checkpoint with funcprobe run, or train with DistributedDataParallel"
        )
    if accelerator.scaler is not None and accelerator.scaler.is_enabled():
        raise InputError(
            "float16 with a GradScaler, which scales gradients and may skip the predicted step: train "
            "in bf16 or float32, or probe the checkpoint with funcprobe run"
        )
    made = type(optimizer)
    if made is not torch.optim.AdamW and made.__module__ != "bitsandbytes.optim.adamw":
        raise InputError(
            f"the optimizer is {made.__module__}.{made.__qualname__}, whose step need not be AdamW's: "
            'train with torch.optim.AdamW itself (optim = "adamw_torch" or "adamw_torch_fused")'
        )
    if hooks := _step_hooks(optimizer):
        raise InputError(
            f"the optimizer has a step hook ({', '.join(hooks)}), which may change gradients or "
            "parameters after the step is predicted: remove it"
        )


def adam_state(optimizer: torch.optim.Optimizer, model: nn.Module, params: Params) -> AdamState:
    """A copy of Adam's state before the next step; zeros for parameters that have none yet.

    Of the registry's parameters only: frozen ones, which an optimizer may contain, never have a state.
    """
    state = optimizer.state
    trained = {id(p) for n, p in model.named_parameters() if n in params}
    held = [p for group in optimizer.param_groups for p in group["params"] if id(p) in trained]
    if all(state.get(p) for p in held):
        return live_adam_state(optimizer, model, params)[0]
    keys = ("lr", "initial_lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")
    groups = [
        {"params": group["params"], **{key: group[key] for key in keys if key in group}}
        for group in optimizer.param_groups
    ]
    begun = torch.optim.AdamW(groups)
    for p in held:
        zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        begun.state[p] = state.get(p) or {"step": torch.tensor(0.0), **zeros}
    return live_adam_state(begun, model, params)[0]


def lr_now(optimizer: torch.optim.Optimizer, model: nn.Module, state: AdamState) -> float:
    """Learning rate of the next step, of the state's first group, per unit of which v is defined.

    The state itself has initial_lr if all are 0.
    """
    first = dict(model.named_parameters())[state.groups[0].names[0]]
    held = (group for group in optimizer.param_groups if any(p is first for p in group["params"]))
    return float(next(held)["lr"])


def ascent(model: nn.Module, params: Params) -> Params:
    """Y = -grad of the loss, copied to the CPU, for the parameters that have a gradient."""
    found = {n: p.grad for n, p in model.named_parameters() if n in params and p.grad is not None}
    wide = {
        n: g.detach().to("cpu", torch.promote_types(g.dtype, torch.float32)) for n, g in found.items()
    }
    return tree.scale(-1.0, wide)


@contextmanager
def at_rest(model: Any) -> Iterator[None]:
    """The model as the core needs it: no dropout, no checkpointing, computation in the weights' dtypes.

    Every module in eval mode and without gradient checkpointing, no hook that makes embeddings require
    gradients, no compiled layer, no autocast, an empty generation config. At the end, also after an
    exception, all of it is restored, object by object, and so are the random states of Python, numpy
    and torch.
    """
    base = causal_lm(model)
    device = next(model.parameters()).device.type
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with ExitStack() as stack:
        stack.callback(random.setstate, python_state)
        stack.callback(np.random.set_state, numpy_state)
        stack.enter_context(random_state_kept())
        stack.enter_context(torch.autocast(device, enabled=False))
        for module in model.modules():
            stack.enter_context(_swapped(module, "training", False))
            if getattr(module, "gradient_checkpointing", False):
                stack.enter_context(_swapped(module, "gradient_checkpointing", False))
            # The trainer's gradient lacks the row of a padding token (adapters/checkpoint/padding.py).
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                stack.enter_context(_swapped(module, "padding_idx", None))
            if module._compiled_call_impl is not None:  # Module.compile(); forward is unchanged
                stack.enter_context(_swapped(module, "_compiled_call_impl", None))
            # Not disable_input_require_grads(), which removes the last hook only: peft, TRL and every
            # gradient_checkpointing_enable() add one (transformers 5.23).
            hooks = vars(module)["_forward_hooks"]
            kept = OrderedDict((k, hook) for k, hook in hooks.items() if not _asks_for_gradients(hook))
            if len(kept) < len(hooks):
                stack.enter_context(_swapped(module, "_forward_hooks", kept))
            if getattr(module, "_require_grads_hooks", None):
                stack.enter_context(_swapped(module, "_require_grads_hooks", []))
        # generate() takes every unset option from here.
        stack.enter_context(_swapped(base, "generation_config", GenerationConfig()))
        # peft's generate() leaves an attribute of this name behind (0.21).
        if isinstance(model, PeftModel):
            prepare = model.base_model.prepare_inputs_for_generation
            stack.enter_context(_swapped(model.base_model, "prepare_inputs_for_generation", prepare))
        # accelerate's mixed precision replaces the outermost forward and stores the original.
        if "_original_forward" in vars(model):
            stack.enter_context(_swapped(model, "forward", model._original_forward))
        yield


@contextmanager
def _swapped(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Replace an instance's attribute, then restore it, or delete it if the instance had none."""
    before = vars(module).get(name, _ABSENT)
    setattr(module, name, value)
    try:
        yield
    finally:
        if before is _ABSENT:
            delattr(module, name)
        else:
            setattr(module, name, before)


def _step_hooks(optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of hooks that run before or after each step, of this optimizer or global."""
    places = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        _global_optimizer_pre_hooks,
        _global_optimizer_post_hooks,
    )
    hooks = [hook for place in places for hook in place.values()]
    return [getattr(hook, "__qualname__", type(hook).__qualname__) for hook in hooks]


def _asks_for_gradients(hook: Any) -> bool:
    """Whether this is transformers' or peft's hook on input embeddings, by its name in both."""
    return "make_inputs_require_grad" in getattr(hook, "__qualname__", "")
