"""`id3_optim.methods`: every method trains by one optimizer, and trains what its name says."""

import copy

import pytest
import torch
from tiny_models import save_bert, save_llama, word_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from id3_optim import D3, ID3AdamW, methods, pools, recipe

HEAD = {"classifier.weight", "classifier.bias"}
BUDGET = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def bert(folder):
    torch.manual_seed(1)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)


def batches(n=6, rows=4):
    texts = ["the film was good", "a book was awful", "the film is fine", "the book was bad"]
    encoded = word_tokenizer(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")(
        texts, padding=True, return_tensors="pt"
    )
    whole = {**encoded, "labels": torch.tensor([0, 1, 0, 1])}
    cut = [{k: v[i : i + rows] for k, v in whole.items()} for i in range(0, 4, rows)]
    return (cut * n)[:n]


def trained(name, model, steps=6, **options):
    """The model after some steps by the method, what `prepare` returned, and the losses."""
    options = {"budget": BUDGET, "lr": 1e-2, "total_steps": steps, "fresh": HEAD} | options
    ready = methods.prepare(name, model, examples=batches(8, rows=1), **options)
    losses = []
    model.train()
    for step, batch in enumerate(batches(steps)):
        loss = model(**batch).loss
        loss.backward()
        ready.optimizer.step()
        if ready.after_step is not None:
            ready.after_step(step)
        ready.optimizer.zero_grad()
        losses.append(loss.item())
    return ready, losses


def differing(before, model):
    """Entries of each parameter that differ from `before`, by name."""
    return {n: int((p != before[n]).sum()) for n, p in model.named_parameters() if n in before}


@pytest.mark.parametrize("name", methods.names())
def test_every_method_trains_and_learns_within_its_budget(bert, name):
    before = {n: p.detach().clone() for n, p in bert.named_parameters()}
    ready, losses = trained(name, bert, steps=12)
    assert isinstance(ready.optimizer, ID3AdamW) and ready.model is bert
    assert min(losses[-3:]) < losses[0]
    changed = differing(before, bert)
    assert sum(changed[n] for n in HEAD) > 0
    own = sum(count for n, count in changed.items() if n not in HEAD)
    dynamic = "dynamic" in name or name.startswith("repeat")
    if "+" in name or name in ("head", "lora", "adalora", "shira", "adapter", "sparse-adapter"):
        assert own == 0  # the base is frozen; the pool is an adapter
    elif name != "full" and not dynamic:
        assert 0 < own <= ready.budget <= BUDGET
    if name.partition("+")[0] in methods.SELECTIVE:
        assert 0 < ready.optimizer.n_active <= ready.budget <= min(BUDGET, ready.pool_entries)


@pytest.mark.parametrize("name", ["lora", "adalora", "shira"])
def test_rivals_have_at_most_as_many_entries_and_nearly_as_many(bert, name):
    per_rank = 2 * (4 * (16 + 16) + 2 * (16 + 32))
    ready, _ = trained(name, bert, budget=3 * per_rank + 5)
    exactly = {"lora": 3 * per_rank, "shira": 3 * per_rank, "adalora": 5 * (per_rank + 12)}  # init_r = 1.5 r
    assert ready.budget == ready.pool_entries == exactly[name]


def test_where_no_rank_fits_query_and_value_remain(bert):
    assert pools.largest_rank(bert, 300) == (
        2,
        [f"bert.encoder.layer.{i}.attention.self.{part}" for i in (0, 1) for part in ("query", "value")],
    )


def test_the_rank_of_adalora_falls_to_its_budget(bert):
    per_rank = 2 * (4 * (16 + 16) + 2 * (16 + 32))
    trained("adalora", bert, budget=2 * per_rank, steps=40)
    alive = sum(int((p != 0).sum()) for n, p in bert.named_parameters() if "lora_E" in n)
    assert alive == 2 * 12


def test_adalora_is_penalised_in_training_alone(bert):
    methods.prepare("adalora", bert, HEAD, budget=1000, lr=1e-2, total_steps=20)
    batch = batches(1)[0]
    plain = torch.nn.functional.cross_entropy(bert.eval()(**batch).logits, batch["labels"])
    assert torch.equal(bert(**batch).loss, plain)
    torch.manual_seed(0)
    penalised = bert.train()(**batch).loss
    torch.manual_seed(0)
    logits = bert(**batch).logits
    assert penalised - torch.nn.functional.cross_entropy(logits, batch["labels"]) > 0.1


@pytest.mark.parametrize("name", ["lora", "adalora", "shira", "id3+lora"])
def test_merged_weights_give_the_same_model(bert, name):
    plain = {n for n, _ in bert.named_parameters()}
    ready, _ = trained(name, bert)
    bert.eval()
    logits = bert(**batches(1)[0]).logits
    merged = ready.merge()
    assert {n for n, _ in merged.named_parameters()} == plain
    torch.testing.assert_close(merged(**batches(1)[0]).logits, logits, rtol=1e-4, atol=1e-5)


def test_adapters_are_loaded_again(bert, folder, tmp_path):
    trained("id3+adapter", bert)
    bert.eval().save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2).eval()
    batch = batches(1)[0]
    assert not torch.equal(again(**batch).logits, bert(**batch).logits)
    pools.load_bottlenecks(again, tmp_path)
    assert torch.equal(again(**batch).logits, bert(**batch).logits)
    with pytest.raises(ValueError, match=r"folder: expected .*adapter.* in .*, got none"):
        pools.load_bottlenecks(AutoModelForSequenceClassification.from_pretrained(folder), folder)


def test_random_follows_the_seed_and_so_do_adapters(bert):
    twins = [copy.deepcopy(bert) for _ in range(3)]
    for twin, seed in zip(twins, (1, 1, 2), strict=True):
        state = torch.get_rng_state()
        methods.prepare("random+adapter", twin, HEAD, budget=50, lr=1e-2, total_steps=4, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
    weights = [
        dict(t.named_parameters())["bert.encoder.layer.0.output.dense.adapter.up.weight"] for t in twins
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_bitfit_trains_bias_terms_alone(bert):
    before = {n: p.detach().clone() for n, p in bert.named_parameters()}
    trained("bitfit", bert)
    changed = {n for n, count in differing(before, bert).items() if count} - HEAD
    assert changed and all(n.endswith("bias") for n in changed)


def test_fish_takes_the_largest_squared_gradients(bert):
    twin = copy.deepcopy(bert).eval()
    total = {n: torch.zeros_like(p) for n, p in twin.named_parameters() if n not in HEAD}
    for batch in batches(8, rows=1):
        twin.zero_grad()
        twin(**batch).loss.backward()
        for n, p in twin.named_parameters():
            if n not in HEAD and p.grad is not None:
                total[n] += p.grad**2
    best = torch.cat([t.flatten() for t in total.values()]).topk(BUDGET).values[-1]
    ready, _ = trained("fish", bert, steps=1)
    names = {id(p): n for n, p in bert.named_parameters()}
    for touched in ready.optimizer.touched():
        expected = (total[names[id(touched.param)]].flatten() >= best).nonzero()[:, 0]
        assert touched.indices.tolist() == expected.tolist()


def test_a_diff_mask_leaves_weights_and_gradients_as_they_were(bert):
    before = {n: p.detach().clone() for n, p in bert.named_parameters()}
    bert.train()
    methods.prepare("diff", bert, HEAD, budget=50, lr=1e-2, total_steps=4, examples=batches(20, rows=1))
    assert not any(differing(before, bert).values())
    assert all(p.grad is None for p in bert.parameters()) and bert.training


def test_a_share_is_of_the_models_own_entries_whatever_the_pool(bert):
    own = sum(p.numel() for n, p in bert.named_parameters() if n not in HEAD)
    for name in ("id3", "id3+lora", "id3+adapter"):
        ready = methods.prepare(name, copy.deepcopy(bert), HEAD, budget=0.01, lr=1e-2, total_steps=4)
        assert ready.budget == int(0.01 * own)


def test_embeddings_can_be_left_out(bert):
    before = {n: p.detach().clone() for n, p in bert.named_parameters()}
    whole = sum(p.numel() for n, p in bert.named_parameters() if n not in HEAD)
    ready, _ = trained("id3", bert, budget=0.1, leave_out=["embeddings"])
    changed = differing(before, bert)
    assert not any(count for n, count in changed.items() if "embeddings" in n)
    assert ready.budget == int(0.1 * whole) and sum(changed.values()) > 0


def test_options_take_precedence(bert):
    ready, _ = trained("id3", bert, heuristic=D3(0.5, 1.0), select_every=2, head_options={"lr": 0.5})
    assert ready.optimizer.heuristic == D3(0.5, 1.0) and ready.optimizer.method.select_every == 2
    assert [group["lr"] for group in ready.optimizer.param_groups] == [1e-2, 0.5]


def test_a_language_model(tmp_path):
    ids = torch.randint(5, 18, (4, 8))
    for name in ("id3", "lora", "id3+adapter", "shira"):
        model = AutoModelForCausalLM.from_pretrained(save_llama(tmp_path / name))
        ready = methods.prepare(name, model, budget=0.05, lr=1e-2, total_steps=8)
        losses = []
        for _ in range(8):
            losses.append(model(input_ids=ids, labels=ids).loss)
            losses[-1].backward()
            ready.optimizer.step()
            ready.optimizer.zero_grad()
        assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("id4", {}, "method: expected one of full, .*, got 'id4'"),
        ("fish", {}, "examples: expected labelled examples for the method fish, got none"),
        ("id3", {"fresh": {"x"}}, "fresh: expected names of the model's parameters, got 'x'"),
        ("id3", {"leave_out": ["x"]}, "leave_out: expected parts of the model's parameter names, got 'x'"),
        ("head", {"fresh": ()}, "fresh: expected parameters to train by the method head, got none"),
    ],
)
def test_refusals_change_nothing(bert, name, options, message):
    with pytest.raises(ValueError, match=message):
        methods.prepare(name, bert, **{"budget": 10, "lr": 1e-2, "total_steps": 4} | options)
    assert all(p.requires_grad for p in bert.parameters())


def test_every_method_is_described():
    assert all(methods.describe(name) for name in methods.names())
    assert len(set(map(methods.describe, methods.names()))) == len(methods.names())


def test_the_recipe_leaves_embeddings_out_and_counts_them(bert):
    before = {n: p.detach().clone() for n, p in bert.named_parameters()}
    own = sum(p.numel() for n, p in before.items() if n not in HEAD)
    optimizer = recipe(bert, HEAD, total_steps=4, budget=0.1, max_grad_norm=1.0)
    assert all(group["lr"] == 1e-2 for group in optimizer.param_groups)
    for batch in batches(4):
        bert(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = differing(before, bert)
    embedded = [n for n in changed if "_embeddings.weight" in n]
    assert len(embedded) == 3 and not any(changed[n] for n in embedded)
    assert optimizer.n_active == int(0.1 * own) and all(changed[n] for n in HEAD)


def test_a_recipe_draws_by_its_seed_and_takes_another_rate(bert):
    masks = []
    for seed in (0, 1):
        model = copy.deepcopy(bert)
        optimizer = recipe(model, HEAD, total_steps=4, lr=3e-3, seed=seed)
        assert optimizer.param_groups[0]["lr"] == 3e-3
        model(**batches(1)[0]).loss.backward()
        optimizer.step()
        masks.append(torch.cat([t.indices for t in optimizer.touched()]))
    assert not torch.equal(*masks)


def test_a_head_that_is_tied_to_the_embeddings_stays():
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    ))  # fmt: skip
    assert methods.embeddings(model) == ["model.embed_tokens.weight"]
    recipe(model, total_steps=4)
    assert not model.lm_head.weight.requires_grad and model.model.norm.weight.requires_grad


def test_a_recipe_with_a_wrong_head_changes_nothing(bert):
    with pytest.raises(ValueError, match="fresh: expected names of the model's parameters, got 'no'"):
        recipe(bert, ["no"], total_steps=4)
    assert all(p.requires_grad for p in bert.parameters())


@pytest.mark.parametrize(("name", "rate"), [(None, 1e-3), ("id3", 1e-3), ("recipe", 1e-2), ("full", 2e-5)])
def test_methods_have_rates_to_begin_from(name, rate):
    assert methods.default_rate(name) == rate


def test_a_recipe_freezes_embeddings_alone_and_takes_any_iterable():
    model = torch.nn.ModuleDict({"emb": torch.nn.Embedding(9, 4), "class_emb": torch.nn.Linear(4, 4)})
    optimizer = recipe(model, (name for name in ["class_emb.bias"]), total_steps=2, budget=4)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True]
    assert [group["dense"] for group in optimizer.param_groups] == [False, True]
