"""torch's schedulers and weight averages on ID3AdamW with every entry active, beside torch.optim.AdamW."""

import copy
from itertools import pairwise

import pytest
import torch
from torch.optim import lr_scheduler
from torch_contract import INFO, adamw, check_parity, descend, id3, matrix_and_vector

LR_SCHEDULERS = [scheduler for group in INFO.scheduler_inputs for scheduler in group]
LR_SCHEDULERS += [
    lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.95**step),
    lambda o: lr_scheduler.MultiStepLR(o, [3, 7]),
    lambda o: lr_scheduler.ConstantLR(o, total_iters=4),
    lambda o: lr_scheduler.LinearLR(o, total_iters=8),
    lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    lambda o: lr_scheduler.PolynomialLR(o, 12),
    lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=40),  # moves betas too
    lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, cycle_momentum=False),
    lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[5]
    ),
]


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("i", range(len(LR_SCHEDULERS)))
def test_every_scheduler_gives_the_same_run(i, tensor_lr):
    lr = torch.tensor(1e-2) if tensor_lr else 1e-2
    runs = []
    for make in (id3, adamw):
        params = matrix_and_vector()
        optimizer = make([{"params": [params[0]]}, {"params": [params[1]], "lr": copy.deepcopy(lr)}], lr=lr)
        descend(optimizer, params, torch.ones(5), 15, [LR_SCHEDULERS[i](optimizer)])
        runs.append((params, [float(group["lr"]) for group in optimizer.param_groups]))
    assert runs[0][1] == pytest.approx(runs[1][1])
    check_parity(runs[0][0], runs[1][0], 1e-2)


def test_swa_averages_the_model():
    params = matrix_and_vector()
    model = torch.nn.ParameterList(params)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    optimizer = id3(params, lr=1e-2)
    scheduler = torch.optim.swa_utils.SWALR(optimizer, swa_lr=1e-3, anneal_epochs=2)
    seen = []
    for _ in range(4):
        descend(optimizer, params, torch.ones(5), 1, [scheduler])
        averaged.update_parameters(model)
        seen.append(params[0].detach().clone())
    torch.testing.assert_close(averaged.module[0], torch.stack(seen).mean(0))
    assert all(not torch.equal(a, b) for a, b in pairwise(seen))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
