"""ID3AdamW in Lightning's Trainer: number of steps, deltas beside checkpoints, exact resume, precision."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("lightning", reason="Lightning comes with the extra `lightning`")

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from id3_optim import ID3AdamW, load_delta
from id3_optim.integrations.lightning import ID3Callback


class Tagger(pl.LightningModule):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(20, 30), torch.nn.GELU(), torch.nn.Dropout(0.1), torch.nn.Linear(30, 4)
        )
        self.options = {"lr": 1e-2, "budget": 60} | options

    def training_step(self, batch, batch_idx):
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = ID3AdamW(self.named_parameters(), **self.options)
        decay = torch.optim.lr_scheduler.LinearLR(
            optimizer, 1.0, 0.1, min(self.trainer.estimated_stepping_batches, 100)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


def loader(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 20, generator=generator, dtype=torch.float32).to(dtype)
    rows = torch.utils.data.TensorDataset(x, x[:, :4].argmax(1))
    return torch.utils.data.DataLoader(rows, batch_size=4)


def fit(folder, ckpt=None, module=None, callback=None, dtype=torch.float32, **changes):
    """10 batches of 4, accumulated over 2, for 2 epochs: 10 steps, a checkpoint every 3."""
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    options = {"max_epochs": 2, "accumulate_grad_batches": 2, "accelerator": "cpu", "logger": False}
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    options |= {"callbacks": [callback or ID3Callback(), keep]}
    trainer = pl.Trainer(default_root_dir=folder, **options | changes)
    module = module or Tagger(max_grad_norm=1.0)
    pl.seed_everything(5, verbose=False)
    trainer.fit(module, loader(dtype), ckpt_path=ckpt)
    return module, trainer.optimizers[0]


def same_bits(a, b):
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def test_the_run_gives_the_number_of_steps(tmp_path):
    module, optimizer = fit(tmp_path)
    assert (optimizer.total_steps, optimizer.steps_done, optimizer.n_active) == (10, 10, 60)
    changed = sum(
        int((p != q).sum()) for p, q in zip(module.parameters(), Tagger().parameters(), strict=True)
    )
    assert 0 < changed <= 60


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_a_delta_beside_each_checkpoint(tmp_path, precision):
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    fit(tmp_path, precision=precision, callback=ID3Callback(originals=True), dtype=dtype)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [f"step={n}.{kind}" for n in (3, 6, 9) for kind in ("ckpt", "delta.safetensors")]
    for n in (3, 6, 9):
        saved = torch.load(tmp_path / f"step={n}.ckpt", weights_only=True)["state_dict"]
        base = Tagger().to(dtype)
        delta = load_delta(tmp_path / f"step={n}.delta.safetensors")
        delta.apply(base)
        assert delta.settings["step"] == n
        assert all(torch.equal(value, saved[name]) for name, value in base.state_dict().items())


def test_a_delta_goes_with_its_checkpoint(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=1)
    fit(tmp_path, callbacks=[ID3Callback(submodule="net"), keep])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step=9.ckpt", "step=9.delta.safetensors"]
    delta = load_delta(tmp_path / "step=9.delta.safetensors")
    assert delta.changes.keys() <= {name for name, _ in Tagger().net.named_parameters()}
    delta.apply(Tagger().net)


def test_deltas_can_be_left_out(tmp_path):
    fit(tmp_path, callback=ID3Callback(save_deltas=False))
    assert {p.suffix for p in tmp_path.iterdir()} == {".ckpt"}


def test_averaged_weights_have_no_delta(tmp_path):
    kind = getattr(pl.callbacks, "EMAWeightAveraging", None)
    if kind is None:
        pytest.skip("this Lightning has none")
    with pytest.raises(ValueError, match="save_deltas: expected False beside EMAWeightAveraging, got True"):
        fit(tmp_path, callbacks=[ID3Callback(), kind()])
    fit(tmp_path, callbacks=[ID3Callback(save_deltas=False), kind()])


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_resume_is_bit_exact(tmp_path, precision):
    """Dropout is off: Lightning restores no generator states."""
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32

    def start(folder, ckpt=None):
        module = Tagger(max_grad_norm=1.0, bias_correction="entry")
        module.net[2].p = 0.0
        every = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1)
        callbacks = [ID3Callback(), every]
        return fit(folder, ckpt, module, precision=precision, callbacks=callbacks, dtype=dtype)

    straight, optimizer = start(tmp_path / "straight")
    resumed, second = start(tmp_path / "resumed", tmp_path / "straight/step=5.ckpt")
    assert (second.steps_done, second.total_steps, second.n_active) == (10, 10, 60)
    assert same_bits(straight, resumed)
    for mine, theirs in zip(second.touched(), optimizer.touched(), strict=True):
        assert torch.equal(mine.indices, theirs.indices)


def test_more_steps_train_what_is_active_and_fewer_are_refused(tmp_path):
    fit(tmp_path)
    with pytest.warns(UserWarning, match="max_steps: 15, more than the 10, over which"):
        _, longer = fit(tmp_path / "longer", tmp_path / "step=6.ckpt", max_epochs=3)
    assert (longer.total_steps, longer.steps_done, longer.n_active) == (10, 15, 60)
    with pytest.raises(ValueError, match=r"max_steps: expected at least 10, over which .*, got 8"):
        fit(tmp_path / "shorter", tmp_path / "step=6.ckpt", max_steps=8)
    given = Tagger(total_steps=30)
    fit(tmp_path / "given", module=given)
    _, optimizer = fit(
        tmp_path / "more", tmp_path / "given/step=6.ckpt", Tagger(total_steps=30), max_epochs=3
    )
    assert (optimizer.total_steps, optimizer.steps_done, optimizer.n_active) == (30, 15, 30)


@pytest.mark.parametrize("states", ["none", "none, no record", "of step 6"])
def test_a_checkpoint_without_the_optimizers_state_is_refused(tmp_path, states):
    """Lightning refuses one of `save_weights_only` itself; a hook may still take the state out."""
    fit(tmp_path)
    saved, later = (torch.load(tmp_path / f"step={n}.ckpt", weights_only=True) for n in (3, 6))
    saved["optimizer_states"] = later["optimizer_states"] if states == "of step 6" else []
    saved["lr_schedulers"] = []
    if states == "none, no record":
        next(state for name, state in saved["callbacks"].items() if "ID3" in name).pop("steps_done")
    torch.save(saved, tmp_path / "lost.ckpt")
    got = 6 if states == "of step 6" else 0
    with pytest.raises(ValueError, match=rf"resume: expected an optimizer with 3 steps.*, got {got};"):
        fit(tmp_path / "again", tmp_path / "lost.ckpt")


def test_the_weights_of_a_checkpoint_begin_a_new_run(tmp_path):
    """The remedy; its deltas fit these weights."""
    fit(tmp_path)
    start = Tagger.load_from_checkpoint(tmp_path / "step=3.ckpt")
    base = Tagger.load_from_checkpoint(tmp_path / "step=3.ckpt")
    _, optimizer = fit(tmp_path / "new", module=start)
    assert (optimizer.steps_done, optimizer.n_active) == (10, 60)
    load_delta(tmp_path / "new/step=9.delta.safetensors").apply(base)


def test_a_run_without_an_end_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"max_steps: expected a limit, or one in max_epochs, got -1"):
        fit(tmp_path, max_epochs=-1)

    class After(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step == 4

    stop = [ID3Callback(), After()]
    _, optimizer = fit(tmp_path, module=Tagger(total_steps=6), max_epochs=-1, min_epochs=0, callbacks=stop)
    assert (optimizer.total_steps, optimizer.steps_done, optimizer.n_active) == (6, 4, 40)


def test_another_optimizer_is_refused(tmp_path):
    class Plain(Tagger):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    with pytest.raises(ValueError, match="configure_optimizers: expected one ID3AdamW, got 0"):
        fit(tmp_path, module=Plain())


def test_clipping_of_the_trainer(tmp_path):
    """In 32 bit it clips by the dense norm; with mixed precision Lightning refuses it beside ID3AdamW."""
    fit(tmp_path / "a", gradient_clip_val=0.5)
    with pytest.raises(RuntimeError, match="ID3AdamW, does not allow for gradient clipping"):
        fit(tmp_path / "b", gradient_clip_val=0.5, precision="bf16-mixed")


def test_logs(tmp_path):
    fit(tmp_path, logger=CSVLogger(tmp_path, "logs"))
    header, *lines = next(tmp_path.glob("logs/*/metrics.csv")).read_text().splitlines()
    assert {"n_active", "threshold", "sparsity_entropy"} <= set(header.split(","))
    assert lines[-1].split(",")[header.split(",").index("n_active")] == "60.0"


@pytest.mark.parametrize(
    ("submodule", "message"),
    [
        ("model", "submodule: expected the name of a module in Tagger, got 'model'"),
        ("net.0", r"model: expected every trained parameter in it, got none for \(4, 30\)"),
    ],
)
def test_a_submodule_without_what_is_trained_is_refused_before_training(tmp_path, submodule, message):
    module = Tagger()
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, module=module, callback=ID3Callback(submodule=submodule))
    assert same_bits(module, Tagger())
    fit(tmp_path, callback=ID3Callback(save_deltas=False, submodule=submodule))  # where it is not asked for


def second_fit(folder, ckpt=None):
    """Epochs 3 and 4 in a second `fit` of one Trainer, whose optimizer is new: 10 more steps."""
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    module, options = Tagger(), {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=2, accumulate_grad_batches=2, callbacks=[ID3Callback(), keep], **options)
    if ckpt is None:
        trainer.fit(module, loader())
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, loader(), ckpt_path=ckpt)
    return trainer.optimizers[0]


def test_a_second_fit_spends_its_whole_budget(tmp_path):
    for optimizer in (second_fit(tmp_path), second_fit(tmp_path, tmp_path / "step=15.ckpt")):
        assert (optimizer.total_steps, optimizer.steps_done, optimizer.n_active) == (10, 10, 60)


def test_a_callback_of_an_earlier_run_leaves_total_steps_alone(tmp_path):
    callback = ID3Callback()
    fit(tmp_path / "a", callback=callback)
    _, optimizer = fit(tmp_path / "b", module=Tagger(total_steps=30), callback=callback)
    assert optimizer.total_steps == 30


def test_a_delta_for_each_of_names_with_dots(tmp_path):
    names = ("w-0.1", "w-0.2", "w-0.3.ckpt")

    class Save(pl.Callback):
        def on_train_end(self, trainer, module):
            for name in names:
                trainer.save_checkpoint(tmp_path / name)

    fit(tmp_path, callbacks=[ID3Callback(), Save()], enable_checkpointing=False)
    deltas = {f"{name.removesuffix('.ckpt')}.delta.safetensors" for name in names}
    assert {p.name for p in tmp_path.iterdir()} == {*names, *deltas}


def test_it_needs_no_transformers():
    """torchmetrics, which Lightning imports, takes transformers where it is installed: it goes first."""
    program = (
        "import sys, lightning.pytorch\n"
        "for name in [n for n in sys.modules if n.split('.')[0] == 'transformers']: del sys.modules[name]\n"
        "sys.modules['transformers'] = None\n"
        "import torch, id3_optim.integrations.lightning\n"
        "from id3_optim.integrations.groups import fresh_parameters, parameter_groups\n"
        "model = torch.nn.Linear(2, 2)\n"
        "fresh = fresh_parameters(model, {'missing_keys': ['bias'], 'mismatched_keys': []})\n"
        "print([group['dense'] for group in parameter_groups(model, fresh)[1:]])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "[True]"
