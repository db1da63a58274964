"""What each process runs for `test_trainer_fsdp2.py`: Accelerate's FSDP2 in the Trainer and in a plain loop.

Arguments: a folder; or `example`, a path and its arguments, which runs with Accelerate told so.

Accelerate takes up FSDP2 on accelerators alone. `told` sets, on the CPU, what it would set on a GPU; what
follows, from the split to the checkpoints, is Accelerate's and the Trainer's own code.
"""

import runpy
import sys
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from trainer_run import HEAD, arguments, id3, rows, same_bits, tiny_bert

from id3_optim import load_delta, save_delta
from id3_optim.cli.processes import leave
from id3_optim.distributed.part import full, is_split
from id3_optim.integrations.huggingface import ID3Callback, id3_optimizer
from id3_optim.wrappers import unwrapped


def told(accelerator, kind, layer="BertLayer"):
    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    # Without a name Accelerate 1.15 splits the embeddings twice, which torch refuses.
    options = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": [layer]}
    options["state_dict_type"] = kind
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **options)


class Trainer(transformers.Trainer):
    kind = None

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if self.kind is not None:
            told(self.accelerator, self.kind)
            self.is_fsdp_enabled = True


def trained(folder, kind, checkpoint=None):
    """4 steps, a checkpoint after 2; the whole weights."""
    args = arguments(folder, max_steps=4, save_steps=2, gradient_accumulation_steps=1, ddp_backend="gloo")
    pair = id3_optimizer(args, HEAD, budget=40, max_grad_norm=1.0)
    Trainer.kind = kind
    callbacks = {"callbacks": [ID3Callback()], "optimizer_cls_and_kwargs": pair}
    trainer = Trainer(model=tiny_bert(), args=args, train_dataset=rows(), **callbacks)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert unwrapped(trainer.optimizer).n_active == 40
    assert any(is_split(p) for p in trainer.model.parameters()) == (kind is not None)
    return {name: full(p.detach()).clone() for name, p in trainer.model.named_parameters()}


def trainer(folder):
    """Split as whole, straight as resumed, and the delta as the weights."""
    whole = trained(folder / "whole", None)
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        straight = trained(folder / kind, kind)
        close = [torch.allclose(whole[name], p, atol=1e-6) for name, p in straight.items()]
        assert all(close), "dense groups differ in the last bit, and the entries are the same"
        base = tiny_bert()
        load_delta(folder / kind / "checkpoint-4/delta.safetensors").apply(base)
        assert same_bits(dict(base.named_parameters()), straight)
        assert same_bits(trained(folder / kind, kind, f"{folder / kind}/checkpoint-2"), straight)


def pushed(folder):
    """Beside what the Trainer uploads lies the delta; amid a checkpoint one process alone is asked."""
    args = arguments(folder, max_steps=2, gradient_accumulation_steps=1, ddp_backend="gloo")
    given = {"optimizer_cls_and_kwargs": id3_optimizer(args, HEAD, budget=40), "callbacks": [ID3Callback()]}
    Trainer.kind = "FULL_STATE_DICT"
    trainer = Trainer(model=tiny_bert(), args=args, train_dataset=rows(), **given)
    trainer.train()
    begun = trainer.callback_handler.on_push_begin
    trainer.control.should_save = True
    if trainer.is_world_process_zero():
        begun(args, trainer.state, trainer.control)
    assert not (folder / "delta.safetensors").exists()
    trainer.control.should_save = False
    begun(args, trainer.state, trainer.control)
    torch.distributed.barrier()
    assert load_delta(folder / "delta.safetensors").settings["step"] == 2


def looped(folder, kind, checkpoint=None):
    """Accelerate without a Trainer: prepare, `save_state` after 2 of 4 steps, `load_state`."""
    accelerator, model = Accelerator(cpu=True), tiny_bert().eval()
    told(accelerator, kind)
    optimizer = id3(model, budget=40, total_steps=4, max_grad_norm=1.0)
    model, wrapped = accelerator.prepare(model, optimizer)
    if checkpoint:
        accelerator.load_state(checkpoint)
    for step in range(optimizer.steps_done, 4):
        batch = rows()[2 * step + accelerator.process_index]
        loss = model(input_ids=batch["input_ids"][None], labels=torch.tensor([batch["labels"]])).loss
        accelerator.backward(loss)
        wrapped.step()
        wrapped.zero_grad()
        if optimizer.steps_done == 2:
            accelerator.save_state(folder / "half")
    save_delta(folder / "delta.safetensors", model, wrapped)
    return {name: full(p.detach()).clone() for name, p in model.named_parameters()}


def loop(folder):
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        straight = looped(folder / f"loop-{kind}", kind)
        assert same_bits(looped(folder / f"loop-{kind}", kind, folder / f"loop-{kind}/half"), straight)
        base = tiny_bert()
        load_delta(folder / f"loop-{kind}/delta.safetensors").apply(base)
        assert same_bits(dict(base.named_parameters()), straight)


def example(path):
    """The program at the path; its Trainer finds an accelerator's FSDP2."""
    create = transformers.Trainer.create_accelerator_and_postprocess

    def created(self):
        create(self)
        told(self.accelerator, "FULL_STATE_DICT", "LlamaDecoderLayer")
        self.is_fsdp_enabled = True

    transformers.Trainer.create_accelerator_and_postprocess = created
    sys.path.insert(0, str(Path(path).parent))
    ended = runpy.run_path(path, run_name="__main__")
    assert any(is_split(p) for p in ended["trainer"].model.parameters())


if __name__ == "__main__":
    if sys.argv[1] == "example":
        _, _, path, *arguments = sys.argv
        sys.argv = [path, *arguments]
        example(path)
    else:
        trainer(Path(sys.argv[1]))
        loop(Path(sys.argv[1]))
        pushed(Path(sys.argv[1]) / "pushed")
    leave(0)
