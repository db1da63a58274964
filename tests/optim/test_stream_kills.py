"""A trainer and a receiver in processes of their own, killed twenty times: right weights, or a refusal."""

import hashlib
import multiprocessing
import os
import random
import sys
import time

import pytest
import torch

from id3_optim import ID3AdamW, ResendNeeded, WeightReceiver, WeightStream, load_update

STEPS, KILLS = 400, 20


def first_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.Linear(40, 9)).bfloat16()


def digest(model):
    bits = b"".join(p.detach().contiguous().view(torch.uint8).numpy().tobytes() for p in model.parameters())
    return hashlib.sha256(bits).hexdigest()


def put(path, text):
    """Whole or not there: a killed process leaves no half of a file."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def log(path, *words):
    with open(path, "a") as file:
        file.write(" ".join(map(str, words)) + "\n")


def train(folder):
    torch.set_num_threads(1)
    model = first_model()
    optimizer = ID3AdamW(model.named_parameters(), lr=1e-3, budget=0.2, total_steps=STEPS)
    stream = WeightStream(model, optimizer)
    draw = random.Random(os.getpid())  # a resumed run sees other data, and goes another way
    if (folder / "checkpoint").exists():
        states = torch.load(folder / "checkpoint", weights_only=True)
        for owner, state in zip((model, optimizer, stream), states, strict=True):
            owner.load_state_dict(state)
    while optimizer.steps_done < STEPS:
        generator = torch.Generator().manual_seed(draw.randrange(2**31))
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).bfloat16()
        optimizer.step()
        update = stream.next()
        if send(folder, model, update) == "resend":
            update = stream.next(full=True)
            send(folder, model, update)
        stream.acknowledge(update)
        if draw.random() < 0.3:
            states = [owner.state_dict() for owner in (model, optimizer, stream)]
            torch.save(states, folder / "unfinished")
            os.replace(folder / "unfinished", folder / "checkpoint")


def send(folder, model, update):
    name = f"{update.base_checksum:016x}-{update.target_checksum:016x}-{os.getpid()}-{time.monotonic_ns()}"
    log(folder / "trained", f"{update.target_checksum:016x}", digest(model))
    update.save(folder / name)
    put(folder / "newest", name)
    while True:
        if (folder / "answer").exists():
            answered, word = (folder / "answer").read_text().split()
            if answered == name:
                (folder / name).unlink(missing_ok=True)
                return word
        time.sleep(0.0005)


def serve(folder):
    torch.set_num_threads(1)
    model = first_model()
    receiver, done = WeightReceiver(model), None
    while True:
        name = (folder / "newest").read_text() if (folder / "newest").exists() else None
        if name is None or name == done or not (folder / name).exists():
            time.sleep(0.0005)
            continue
        try:
            receiver.apply_patch(load_update(folder / name))
            log(folder / "served", f"{receiver.checksum:016x}", digest(model))
            word = "ok"
        except ResendNeeded:
            log(folder / "refused", name)
            word = "resend"
        except FileNotFoundError:
            continue
        put(folder / "answer", f"{name} {word}")
        done = name


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")
def test_twenty_kills(tmp_path):
    context, draw = multiprocessing.get_context("fork"), random.Random(1)
    kinds = {"trainer": train, "receiver": serve}
    running = {kind: context.Process(target=run, args=(tmp_path,)) for kind, run in kinds.items()}
    for process in running.values():
        process.start()
    try:
        for _ in range(KILLS):
            time.sleep(draw.uniform(0.02, 0.3))
            kind = draw.choice(list(kinds))
            running[kind].kill()
            running[kind].join()
            running[kind] = context.Process(target=kinds[kind], args=(tmp_path,))
            running[kind].start()
        running["trainer"].join(timeout=60)
        assert running["trainer"].exitcode == 0
    finally:
        for process in running.values():
            process.kill()
            process.join()
    trained = set((tmp_path / "trained").read_text().splitlines())
    served = (tmp_path / "served").read_text().splitlines()
    assert len(served) >= STEPS and set(served) <= trained
    assert served[-1] == (tmp_path / "trained").read_text().splitlines()[-1]
    assert (tmp_path / "refused").exists()
