"""A run of `transformers.Trainer` on a tiny classifier: 32 rows in batches of 2, accumulated over 2."""

import gc
import sys

import torch
import transformers

from id3_optim import ID3AdamW
from id3_optim.integrations.data_parallel import SparseDataParallel
from id3_optim.integrations.huggingface import ID3Callback, id3_optimizer, parameter_groups
from id3_optim.wrappers import unwrapped

HEAD = {"classifier.weight", "classifier.bias"}


def tiny_bert(dtype=torch.float32):
    """Always the same weights; dropout is on."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    return transformers.BertForSequenceClassification(config).to(dtype)


def rows(n=32):
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 50, (8,), generator=generator), "labels": i % 2} for i in range(n)]


def arguments(folder, **changes):
    """8 optimizer steps; a checkpoint every 3."""
    own = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 8,
        "learning_rate": 1e-2,
        "save_steps": 3,
        "logging_steps": 1,
        "max_grad_norm": 0,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return transformers.TrainingArguments(output_dir=folder, **own | changes)


def id3(model, **options):
    return ID3AdamW(parameter_groups(model, HEAD), **{"lr": 1e-2, "budget": 0.05} | options)


def build(args, model=None, callback=None, kind=transformers.Trainer, **options):
    """A Trainer; by `optimizers=` unless options bring `optimizer_cls_and_kwargs`."""
    if "model_init" not in options:
        options["model"] = model or tiny_bert()
    if "optimizer_cls_and_kwargs" not in options and "optimizers" not in options:
        options["optimizers"] = (id3(options["model"]), None)
    trainer = kind(args=args, train_dataset=rows(), callbacks=[callback or ID3Callback()], **options)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def same_bits(a, b):
    """Two models, or dicts of tensors, hold the same names and bits."""
    a, b = (x if isinstance(x, dict) else x.state_dict() for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def one_process(folder):
    """What each of several processes runs: 4 steps, and the last two again from the checkpoint between."""
    args = arguments(folder, max_steps=4, save_steps=2, gradient_accumulation_steps=1, ddp_backend="gloo")
    trainers = []
    for checkpoint in (None, f"{folder}/checkpoint-2"):
        pair = id3_optimizer(args, HEAD, budget=40, max_grad_norm=1.0)
        trainers.append(build(args, optimizer_cls_and_kwargs=pair))
        trainers[-1].train(resume_from_checkpoint=checkpoint)
        assert unwrapped(trainers[-1].optimizer).n_active == 40
    assert torch.distributed.get_world_size() == 2
    assert same_bits(trainers[0].model, trainers[1].model)


class SparseTrainer(SparseDataParallel, transformers.Trainer):
    """As the documentation has it."""


def sparse_process(folder):
    """A run without DistributedDataParallel, the one with it, and a run that is refused."""
    options = {"budget": 40, "max_grad_norm": 1.0, "select_every": 2}
    ends = []
    for kind, own, checkpoint in (
        (SparseTrainer, folder, None),
        (SparseTrainer, folder, f"{folder}/checkpoint-2"),
        (transformers.Trainer, f"{folder}/ddp", None),
    ):
        args = arguments(own, max_steps=4, save_steps=2, gradient_accumulation_steps=1, ddp_backend="gloo")
        sparse = kind is SparseTrainer
        group = {"process_group": torch.distributed.group.WORLD} if sparse else {}
        pair = id3_optimizer(args, HEAD, **options, **group)
        callback = ID3Callback(sparse_backward=sparse)
        trainer = build(args, kind=kind, callback=callback, optimizer_cls_and_kwargs=pair)
        trainer.train(resume_from_checkpoint=checkpoint)
        ends.append(trainer.model.state_dict())
        assert unwrapped(trainer.optimizer).n_active == 40
    assert same_bits(*ends[:2])
    moved = [{n: p - tiny_bert().state_dict()[n] for n, p in end.items()} for end in (ends[0], ends[2])]
    for name, one in moved[0].items():  # up to the order of sums
        assert torch.equal(one == 0, moved[1][name] == 0), name
        assert torch.allclose(one, moved[1][name], atol=1e-4), name
    accumulated_by_the_largest(folder)
    refused(folder, {}, {}, "optimizer: expected ID3AdamW with a process_group, got none")
    whole, own = torch.distributed.group.WORLD, torch.distributed.new_subgroups(1)[0]
    message = "max_grad_norm: expected TrainingArguments(max_grad_norm=0), got 1.0, by which each"
    refused(folder, {"process_group": whole}, {"max_grad_norm": 1.0}, message)
    refused(folder, {"process_group": own}, {}, "process_group: expected all 2 processes, got 1 of them")


def accumulated_by_the_largest(folder):
    """With select_from="max" each batch of a step is sent, since each has its say."""
    args = arguments(folder, max_steps=2, gradient_accumulation_steps=2, ddp_backend="gloo")
    own = {"process_group": torch.distributed.group.WORLD, "release_gradients": True, "select_from": "max"}
    trainer = build(
        args, kind=SparseTrainer, optimizer_cls_and_kwargs=id3_optimizer(args, HEAD, budget=40, **own)
    )
    trainer.train()
    assert unwrapped(trainer.optimizer).n_active == 40


def refused(folder, options, changes, message):
    args = arguments(folder, max_steps=4, ddp_backend="gloo", **changes)
    pair = id3_optimizer(args, HEAD, budget=40, **options)
    try:
        build(args, kind=SparseTrainer, optimizer_cls_and_kwargs=pair).train()
    except ValueError as error:
        assert str(error).startswith(message), error
    else:
        raise AssertionError(f"not refused: {message}")


if __name__ == "__main__":
    {"ddp": one_process, "sparse": sparse_process}[sys.argv[2]](sys.argv[1])
    gc.collect()  # what still holds the group must go before it does, or the two may wait for each other
    torch.distributed.destroy_process_group()
