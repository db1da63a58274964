"""What each of two processes runs for `test_trl.py`: SFTTrainer that sends what a step uses."""

import sys

import torch
from test_trl import ARGUMENTS, FACTS, llama, pieces
from trl import SFTConfig, SFTTrainer

from id3_optim.cli.processes import leave
from id3_optim.integrations.data_parallel import SparseDataParallel
from id3_optim.integrations.huggingface import ID3Callback, id3_optimizer
from id3_optim.wrappers import unwrapped


class SparseSFTTrainer(SparseDataParallel, SFTTrainer):
    """As the documentation has it."""


def main(folder):
    args = SFTConfig(folder, gradient_accumulation_steps=2, ddp_backend="gloo", **ARGUMENTS)
    options = {"budget": 200, "max_grad_norm": 1.0, "select_every": 2}
    pair = id3_optimizer(args, **options, process_group=torch.distributed.group.WORLD)
    given = pieces(FACTS) | {"callbacks": [ID3Callback(sparse_backward=True)]}
    trainer = SparseSFTTrainer(llama(), args, optimizer_cls_and_kwargs=pair, **given)
    trainer.train()
    assert unwrapped(trainer.optimizer).n_active == 200
    own = torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()])
    held = [torch.empty_like(own) for _ in range(2)]
    torch.distributed.all_gather(held, own)
    assert torch.equal(*held)


if __name__ == "__main__":
    main(sys.argv[1])
    leave(0)
