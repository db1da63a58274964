"""A trainer and a generating process: updates reach the server as small files, and it never reloads."""

import multiprocessing

import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from id3_optim import ID3AdamW, ResendNeeded, WeightReceiver, WeightStream, load_update, save_delta


def serve(source, connection):
    """Applies each update that arrives, answers whether it fits, and generates with the new weights."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    receiver = WeightReceiver(model)
    prompt = tokenizer("the colour of the book is", return_tensors="pt").input_ids
    while (path := connection.recv()) is not None:
        try:
            receiver.apply_patch(load_update(path))
        except ResendNeeded as error:
            connection.send((False, str(error)))
            continue
        text = model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)[0]
        connection.send((True, tokenizer.decode(text)))


def main():
    options = tiny.arguments(__doc__)
    source = options.model or tiny.decoder(options.output / "base")
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(source, there), daemon=True)
    server.start()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    rows = [row["prompt"] + row["completion"] for row in tiny.facts(8)]
    ids = tokenizer(rows, padding=True, return_tensors="pt")["input_ids"]
    optimizer = ID3AdamW(model.named_parameters(), lr=1e-2, budget=0.01, total_steps=options.steps)
    stream, path = WeightStream(model, optimizer), options.output / "update.safetensors"
    whole, losses = sum(p.nbytes for p in model.parameters()), []
    for step in range(1, options.steps + 1):
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
        for full in (False, True):  # the whole chain at once where the server has lost its place
            update = stream.next(full=full)
            update.save(path)
            here.send(path)
            fits, answer = here.recv()
            if fits:
                stream.acknowledge(update)
                break
        print(f"step {step}: {path.stat().st_size} bytes of {whole}, {update.entries} entries: {answer}")
    here.send(None)
    model.save_pretrained(options.output / "tuned")
    save_delta(options.output / "delta.safetensors", model, optimizer)
    tiny.report(optimizer, options.output / "delta.safetensors", losses[0].item(), losses[-1].item())


if __name__ == "__main__":
    main()
