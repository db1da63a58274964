"""What the Triton backend does on the host: it asks no GPU, copies nothing to it, and its tables are right.

Tensors on the meta device stand for those on a GPU: they have no content, so whatever would read it raises.
"""

import itertools

import oracle
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

tables = pytest.importorskip("id3_kernels.triton.tables", reason="triton is not installed")

from id3_kernels import reference  # noqa: E402
from id3_kernels import triton as kernels  # noqa: E402
from id3_kernels.triton import launch, score, selection, topk, update  # noqa: E402

SIZES = ((300, 7), (4097,), (70_000,))
CPU, CAPACITY, NUMBERS = torch.device("cpu"), 20, (0.9, 0.999, 1e-8, 0.1)
CACHES = ((tables, "table"), (tables, "layout"), (score, "exponent"))
CACHES += ((update, "unbiased_table"), (update, "root_table"))


class NothingFromTheHost(TorchDispatchMode):
    """Fails where an op reads a tensor of the host, as an upload does; what has no dimension is a number."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        from_host = [a for a in args if isinstance(a, torch.Tensor) and a.device.type == "cpu" and a.dim()]
        assert not from_host, f"{func} reads the host's memory"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def gpu(monkeypatch):
    """A GPU on which nothing happens, empty caches, and tensors that never stay where they were."""
    places = itertools.count(0, 256)
    monkeypatch.setattr(launch, "run", lambda *_: None)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(tables, "address", lambda tensor: next(places))
    for module, name in CACHES:
        monkeypatch.setattr(module, name, tables.Kept(getattr(module, name).make, 64))
    return torch.device("meta")


class Step:
    """The arguments of all ops of a step, of tensors in many dtypes, and of a channels_last one.

    runs: into how many runs the active set of those ops is split that take several; 0: the one form [M + 1].
    """

    def __init__(self, device, runs=0):
        def new(*shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device=device)

        self.params = [new(*shape, dtype=torch.bfloat16) for shape in SIZES]
        self.params.append(new(2, 3, 5, 7).to(memory_format=torch.channels_last))
        self.grads = [None, *(torch.empty_like(p) for p in self.params[1:])]
        self.scores = [None if g is None else new(*g.shape) for g in self.grads]
        self.offsets = new(len(self.params) + 1, dtype=torch.int64)
        self.entries = self.offsets, new(100, dtype=torch.int32)
        rows = new(runs, len(self.params) + 1, dtype=torch.int64) if runs else self.offsets
        self.active = rows, self.entries[1]
        self.values, self.state = new(100), [new(100) for _ in range(3)]
        self.age, self.step = new(100, dtype=torch.int32), new(4, dtype=torch.int64)
        self.k, self.scalar = new(1, dtype=torch.int64), new()
        self.best = new(CAPACITY), new(CAPACITY, dtype=torch.int64), new(CAPACITY)
        self.none, self.ids = new(0, dtype=torch.int64), new(SIZES[0][0], dtype=torch.int64)

    def adamw(self, lr=1e-3, tensor_lr=None):
        scalars = (False, self.scalar, self.scalar, None, tensor_lr)
        return (*self.active, *self.state, self.age, self.step, lr, *NUMBERS, *scalars)

    def collect(self, j, score=None):
        place = (self.active[0][..., j : j + 2], self.entries[1], self.values, True, j)
        tensors = (self.params[j], self.grads[j], score)
        return (*tensors, *place, *self.best, self.none, self.k, True, 1.0, 2.0)

    def sampled(self, *factors):
        return (*factors, self.active[0][..., :2], self.entries[1], self.values, True)

    def join(self):
        joining = self.offsets.clone(), self.entries[1][:CAPACITY], [self.values[:CAPACITY], None]
        return [self.entries[1], *self.state[:2]], self.offsets, *joining


OPS = {
    "d3_score": lambda s: kernels.d3_score(s.params[1], s.grads[1], 1.0, 2.0),
    "select_topk, few": lambda s: kernels.select_topk(s.params, s.grads, *s.active, s.k, CAPACITY, 1.0, 2.0),
    "select_topk, many": lambda s: kernels.select_topk(s.params, s.grads, *s.active, s.k, 5000, 1.0, 0.7),
    "select_topk_by_score": lambda s: kernels.select_topk_by_score(s.scores, *s.active, s.k, CAPACITY),
    "collect_": lambda s: kernels.collect_(*s.collect(2)),
    "collect_ by score": lambda s: kernels.collect_(*s.collect(3, s.scores[3])),
    "sampled_weight_grad_": lambda s: kernels.sampled_weight_grad_(*s.sampled(s.params[0], s.params[0])),
    "sampled_embedding_grad_": lambda s: kernels.sampled_embedding_grad_(*s.sampled(s.params[0], s.ids)),
    "join_": lambda s: kernels.join_(*s.join()),
    "gather": lambda s: kernels.gather(s.params, *s.entries),
    "scatter_": lambda s: kernels.scatter_(s.params, *s.entries, s.values),
    "squared_norm": lambda s: kernels.squared_norm(s.grads, *s.active),
    "adamw_": lambda s: kernels.adamw_(s.params, s.grads, *s.adamw()),
    "adamw_compact_": lambda s: kernels.adamw_compact_(s.params, s.values, *s.adamw(0.0, s.scalar)),
}


@pytest.mark.parametrize("runs", [0, 2], ids=["", "two runs"])
@pytest.mark.parametrize("name", OPS)
def test_no_op_of_a_step_asks_the_device(gpu, name, runs):
    """Neither a number nor a size; and from the second step on, nothing comes from the host's memory."""
    step = Step(gpu, runs)
    OPS[name](step)
    with NothingFromTheHost():
        OPS[name](step)


def test_every_op_of_a_step_is_tried():
    tried = {name.split()[0].strip(",") for name in OPS}
    assert tried == set(kernels.__all__) - {"fingerprint", "union", "why_unavailable"}


QUESTIONS = {
    "a number": lambda t: int(t[0]),
    "numbers": lambda t: t.tolist(),
    "a truth": lambda t: bool((t > 0).all()),
    "a size": lambda t: t.nonzero(),
}


@pytest.mark.parametrize("name", QUESTIONS)
@pytest.mark.parametrize("op", ["select_topk, few", "join_", "adamw_", "squared_norm", "collect_"])
def test_a_question_would_be_seen(gpu, monkeypatch, op, name):
    """The same test with a question put into each launch."""
    of_the_device = torch.empty(3, dtype=torch.int64, device=gpu)
    monkeypatch.setattr(launch, "run", lambda *_: QUESTIONS[name](of_the_device))
    with pytest.raises(RuntimeError, match="meta"):
        OPS[op](Step(gpu))


@pytest.mark.parametrize("capacity", [2, 500], ids=["few", "many"])
@pytest.mark.parametrize("k", [-1, 0, 1])
def test_where_nobody_is_wanted_no_entry_is_read(monkeypatch, capacity, k):
    """Not by the streaming pass and not by a radix pass: all loads of entries are watched."""
    loads = []

    def watched(load):
        return lambda *args: (loads.append(1), load(*args))[1]

    for module, name in ((selection, "load_wide"), (topk, "load_any")):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    tensors = [torch.arange(1.0, 4001.0)]
    entries = torch.tensor([0, 1]), torch.tensor([3999], dtype=torch.int32)
    got = kernels.select_topk(tensors, tensors, *entries, torch.tensor([k]), capacity, 1.0, 0.5)
    assert bool(loads) == (k > 0)
    assert [x[-1 if x is got[0] else 0].item() for x in got[:2]] == ([1, 3998] if k > 0 else [0, 0])


@pytest.mark.parametrize("programs", [1, 3, 50])
@pytest.mark.parametrize("k", [1, 700, 4000, 20_000])
def test_programs_that_go_over_many_blocks_share_the_ties(monkeypatch, programs, k):
    """As they do where there are more than 2 million entries."""
    monkeypatch.setattr(topk, "PROGRAMS", programs)
    generator = torch.Generator().manual_seed(k)
    scores = [torch.randint(0, 9, (n,), generator=generator) / 8 for n in (3000, 1, 8000)]
    entries = torch.tensor([0, 1, 1, 2]), torch.tensor([5, 7999], dtype=torch.int32)
    arguments = (scores, *entries, torch.tensor([k]), k)
    got, want = (b.select_topk_by_score(*arguments) for b in (kernels, reference))
    for a, b in zip(got, want, strict=True):
        oracle.check_bits(a, b)


def test_an_upload_would_be_seen(gpu):
    with NothingFromTheHost(), pytest.raises(AssertionError, match="reads the host's memory"):
        torch.tensor([1, 2, 3]).to(gpu)


def test_a_beta_near_1_asks_nobody(gpu, monkeypatch):
    """Its table ends where the bias is gone for all that matters."""
    monkeypatch.setattr(update, "LONGEST_TABLE", 1000)
    assert update.root_table(1 - 1e-9, gpu).numel() == 1001
    step = Step(gpu)
    arguments = list(step.adamw())
    arguments[9] = 1 - 1e-9
    kernels.adamw_(step.params, step.grads, *arguments)


def test_a_model_of_many_sizes_of_tensors_has_its_layouts_once(monkeypatch):
    made = []
    kept = tables.Kept(lambda *key: made.append(key) or tables.layout.make(*key), 8, tables.layout.most_bytes)
    for _ in range(3):
        for numel in range(1, 300):
            kept((tables.Span(numel, 0, 0, True),), CPU)
    assert len(made) == 299 and tables.layout.most_bytes >= 1 << 20


def test_large_results_are_dropped():
    kept = tables.Kept(lambda n, device: torch.empty(n, dtype=torch.uint8), 2, most_bytes=1000)
    for n in (400, 401, 402, 403):
        kept(n, CPU)
    assert [n for n, _ in kept.recent] == [402, 403] and kept.bytes == 805
    kept.in_graphs[402, CPU] = kept.recent[402, CPU]
    for _ in range(3):
        kept(402, CPU)
    assert kept.bytes == 805


# --- tables ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 200])
def test_a_table_holds_its_numbers_whatever_their_size(n):
    """None from 2^31 to 2^32, which the interpreter itself misreads: compiled, all come as int64."""
    numbers = tuple(
        (0, 1, -1, 16, 2**31 - 99, 2**32, 2**40 + 5, 2**47 + 3)[i % 8] + (i // 8) for i in range(n)
    )
    assert tables.table.make(numbers, CPU)[:n].tolist() == list(numbers)


def kept_numbers(most=2):
    made = []
    return made, tables.Kept(lambda number, device: made.append(number) or torch.tensor([0]), most)


def test_the_last_results_are_kept():
    made, number = kept_numbers()
    for x in (1, 2, 1, 3, 1, 2):
        number(x, CPU)
    assert made == [1, 2, 3, 2]


def test_a_graph_keeps_what_it_reads_and_gives_away_nothing_it_makes(monkeypatch):
    made, number = kept_numbers()
    before = number(1, CPU)
    monkeypatch.setattr(tables, "capturing", lambda device: True)
    assert number(1, CPU) is before
    inside = number(2, CPU)
    monkeypatch.setattr(tables, "capturing", lambda device: False)
    assert number(2, CPU) is not inside
    for x in range(3, 9):
        number(x, CPU)
    assert number(1, CPU) is before
    assert made == [1, 2, 2, *range(3, 9)]


def test_what_has_a_gradient_and_where_it_lies_may_change(monkeypatch):
    """Addresses that move are written anew; the layout stays."""
    written = []
    monkeypatch.setattr(launch, "run", lambda kernel, *_: written.append(kernel))

    tensors = [torch.ones(3), torch.ones(5)]
    tables.addresses(tensors, CPU)
    tables.addresses(tensors, CPU)
    assert written == [tables.write_table_kernel]
    tables.addresses([tensors[1], tensors[0]], CPU)
    tables.addresses([tensors[1], None], CPU)
    assert len(written) == 3
    spans = tuple(selection._span(None, t) for t in tensors)
    assert tables.layout(spans, CPU) is tables.layout(spans, CPU)


def test_a_kept_table_is_waited_for_by_another_stream(monkeypatch):
    """No GPU here: streams that note what they wait for, and memory that notes which other one reads it."""
    waits, reads, current = [], [], ["first"]

    class Result(torch.Tensor):
        def record_stream(self, stream):
            reads.append(str(stream))

    class Stream(str):
        def wait_event(self, event):
            waits.append((str(self), event.of))

    class Event:
        def record(self, stream):
            self.of = str(stream)

    monkeypatch.setattr(tables, "capturing", lambda device: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(current[0]))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    kept = tables.Kept(lambda number, device: (number, torch.zeros(1).as_subclass(Result)), 2)
    device = torch.device("cuda")
    made = kept(1, device)
    assert kept(1, device) is made
    assert waits == reads == []
    current[0] = "second"
    assert kept(1, device) is made
    assert waits == [("second", "first")]
    assert reads == ["second"]
