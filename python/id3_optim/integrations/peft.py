"""ID3AdamW over a PEFT adapter: the budget counts over the adapter's own parameters.

    model = get_peft_model(base, LoraConfig(…))
    model.save_pretrained("initial")  # the base of the adapter's delta
    optimizer = ID3AdamW(adapter_groups(model), lr=1e-3, budget=0.24)  # 76 % sparse

`model.save_pretrained` saves the trained adapter whole, `save_delta` as a delta. Apply the delta to the same
initial adapter: LoRA's A starts from random numbers, and the delta's fingerprint covers only the entries that
it changes, so that a delta of B alone fits any A.
"""

import inspect
from collections.abc import Iterable

import torch
from peft import PeftModel, PeftType, TaskType
from peft.utils import ModulesToSaveWrapper

from .groups import parameter_groups

_TASKS_BY_ARGUMENT = (TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)


def adapter_groups(
    model: torch.nn.Module, fresh: Iterable[str] = (), only: Iterable[str] = (), **dense_options
) -> list[dict]:
    """Param groups for ID3AdamW: the adapter's trainable parameters compete for the budget.

    The model may have an adapter of any PEFT method, or of another kind if only the adapter is trainable.
    Copies that PEFT trains in full (`modules_to_save`, such as a classification head) and `fresh` are a
    `dense=True` group.

    only: parts of names, such as "lora_B". Adapter parameters whose name has none of these parts are left out
    and keep their bits; freeze them to save the memory of their gradients. dense_options: settings of the
    dense group alone, such as `lr`.
    Raises ValueError where no adapter parameter is trainable, or where a part occurs in no parameter's name.
    """
    _check_prefix_tuning(model)
    fresh = set(fresh) | _modules_to_save(model)
    groups = parameter_groups(model, fresh, **dense_options)
    adapter = [] if groups[0].get("dense") else groups[0]["params"]
    if not adapter:
        raise ValueError(
            "model: expected an adapter with trainable parameters, got none; load it by "
            "PeftModel.from_pretrained(…, is_trainable=True)"
        )
    for part in only:
        if not any(part in name for name, _ in adapter):
            raise ValueError(f"only: expected parts of the adapter's parameter names, got {part!r}")
    if only:
        groups[0]["params"] = [(n, p) for n, p in adapter if any(part in n for part in only)]
    return groups


def _check_prefix_tuning(model: torch.nn.Module) -> None:
    """Raises ValueError for prefix tuning that PEFT refuses in every forward pass.

    For these tasks PEFT looks for an argument `past_key_values` in the `forward` of the base model and of its
    backbone, to pass the prefix. Newer releases of transformers have no such argument there.
    """
    if not isinstance(model, PeftModel):
        return
    config = model.active_peft_config
    if config.peft_type != PeftType.PREFIX_TUNING or config.task_type not in _TASKS_BY_ARGUMENT:
        return
    base = model.get_base_model()
    for module in (base, base.get_submodule(model.transformer_backbone_name)):
        if "past_key_values" in inspect.signature(module.forward).parameters:
            return
    raise ValueError(
        f"model: expected a base model whose forward takes past_key_values, as PEFT's prefix tuning for "
        f"{config.task_type} needs, got {type(base).__name__}: take another PEFT method "
        "(LoRA, say) or an older release of transformers"
    )


def _modules_to_save(model: torch.nn.Module) -> set[str]:
    """Names of the parameters in modules that PEFT copies and trains whole."""
    wrappers = {n for n, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    return {
        name
        for name, p in model.named_parameters()
        if p.requires_grad and any(name.startswith(f"{wrapper}.modules_to_save.") for wrapper in wrappers)
    }
