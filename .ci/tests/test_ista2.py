"""ISTA2 beyond its page: references across processes, dependence on the batch, compiled models.

Two processes exchange references over gloo on the CPU, and each compares what it computed with the
authors' record of the same run; the gathered result equals that of one process with both batches.
"""

import json
import os
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import vitlit.models  # noqa: F401  registers the models
from vitlit.check import check_close, relative_error
from vitlit.core import Grid
from vitlit.papers import ista2
from vitlit.records import fill, fill_model, records_path, reference_input
from vitlit.registry import build, create_model

RECORDS = records_path() / 'ista2' / 'attention'


class Given(nn.Module):
    on_grid = True

    def __init__(self, *given):
        super().__init__()
        self.given = given

    def forward(self, x, grid):
        return self.given


def attention(q, k, v, topk, gather):
    "The attention of the record on given queries, keys and values, with its norms filled."
    given = Given(q, k, v, Grid(1, k.shape[1]))
    layer = ista2.AlignedAttention(
        8, 2, qkv=given, proj=nn.Identity(), scale=0.5, topk=topk, gather=gather
    ).double()
    with torch.no_grad():
        for name in 'qkv':
            p = getattr(layer.norm, name).weight
            p.copy_(fill(f'{name}_norm_layer.weight', p.shape))
    return layer


def inputs(rank, batch):
    "Queries, keys and values of one process in the record."
    sizes = dict(q=4, k=5, v=5)
    return [6 * fill(f'{n}@{rank}', (batch, t, 8)) for n, t in sizes.items()]


def compare(rank, file):
    dist.init_process_group('gloo', init_method=f'file://{file}', rank=rank, world_size=2)
    try:
        record = json.loads((RECORDS / 'across_gpus_2ranks.json').read_text())
        for case, batch, topk in (('b2', 2, 2), ('b1', 1, 1)):
            leaves = [t.requires_grad_() for t in inputs(rank, batch)]
            layer, aligned = attention(*leaves, topk, gather=True), []
            layer.value.register_forward_hook(lambda m, args, out: aligned.append(out))
            y = layer(torch.zeros(batch, 4, 8), Grid(1, 4))
            score = (y * fill(f'cotangent@{rank}', y.shape)).sum()
            norms = [getattr(layer.norm, n).weight for n in 'qkv']
            grads = torch.autograd.grad(score, [*leaves, *norms])
            names = [*'qkv', *(f'{n}_norm_layer.weight' for n in 'qkv')]
            expected = record[f'rank{rank}'][case]
            pairs = [(y, expected['out']), (aligned[0].transpose(0, 1), expected['v_aligned'])]
            pairs += [(g, expected['grads'][n]) for n, g in zip(names, grads)]
            for ours, ref in pairs:
                values = torch.tensor(ref['values'], dtype=torch.float64).view(ref['shape'])
                check_close(ours.detach(), values, rtol=1e-9, atol=1e-12)
            # one process that holds both batches, rank by rank, computes the same
            both = [torch.cat(pair) for pair in zip(inputs(0, batch), inputs(1, batch))]
            whole = attention(*both, topk, gather=False)
            together = whole(torch.zeros(2 * batch, 4, 8), Grid(1, 4))
            own = slice(rank * batch, (rank + 1) * batch)
            check_close(y.detach(), together[own].detach(), rtol=1e-12, atol=1e-12)
            # its gradient at our values, with the other process's references held fixed
            v = both[2].clone()
            mine = v[own].requires_grad_()
            fixed = torch.cat((mine, v[own.stop :]) if rank == 0 else (v[: own.start], mine))
            whole = attention(*both[:2], fixed, topk, gather=False)
            together = whole(torch.zeros(2 * batch, 4, 8), Grid(1, 4))[own]
            (g,) = torch.autograd.grad((together * fill(f'cotangent@{rank}', y.shape)).sum(), mine)
            check_close(grads[2], g, rtol=1e-9, atol=1e-12)
    finally:
        dist.destroy_process_group()


def test_two_processes_gather():
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(compare, (os.path.join(folder, 'meeting'),), nprocs=2)


@pytest.mark.parametrize('name', ('ista2_pvtv2_b0', 'ista2_cvt_13', 'ista2_swin_micro'))
def test_dependence_on_the_batch(name):
    "A prediction moves with the size of its batch, not with the order of the others."
    model = fill_model(create_model(name, img_size=64)).double().eval()
    x = reference_input('conformance', 4, 64)
    with torch.no_grad():
        four, two, one = (model(x[:n])[0] for n in (4, 2, 1))
        reordered, copies = model(x[[0, 3, 1, 2]])[0], model(x[[0, 0, 0, 0]])
    assert min(relative_error(a, b) for a, b in ((one, two), (two, four), (copies[0], one))) > 1e-3
    check_close(reordered, four, rtol=1e-10, atol=1e-12)
    check_close(copies, copies[:1].expand_as(copies), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('host', ('deit_micro', 'swin_micro', 'pvtv2_micro', 'cvt_micro'))
def test_reference_sets_compile_and_export(host):
    torch.manual_seed(0)
    model, x = build(host, mixer='ista2').eval(), torch.randn(5, 3, 64, 64)
    nn.init.normal_(model.head.fc.weight, std=0.1)
    bank = ista2.build_references(model, torch.randn(7, 3, 64, 64))
    with ista2.references(model, bank), torch.no_grad():
        expected = model(x)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend='eager')
        assert relative_error(compiled(x), expected) < 1e-5
        torch._dynamo.reset()
        size = torch.export.Dim('batch', min=1, max=64)
        program = torch.export.export(model, (x[:2],), dynamic_shapes=({0: size},))
        traced = torch.fx.symbolic_trace(model)
        scripted = torch.jit.trace(model, x[:2])
    for graph in (program.module(), traced, scripted):
        for n in (1, 5):
            assert relative_error(graph(x[:n]), expected[:n]) < 1e-5


def test_compiled_models_are_watched_too():
    "A graph has no watcher, so the layers are run without it."
    model, x = create_model('ista2_swin_micro', img_size=32).eval(), torch.randn(4, 3, 32, 32)
    banks, lent = [ista2.build_references(model, x)], ista2.lenders(model, x)
    torch._dynamo.reset()
    model.compile(backend='eager')
    model.train()(x)
    banks.append(ista2.build_references(model, x))
    compiled = torch.compile(model, backend='eager')
    compiled(x)
    banks.append(ista2.build_references(compiled, x))
    assert [list(b.values())[0].shape for b in banks] == [list(banks[0].values())[0].shape] * 3
    for bank in banks[1:]:
        for tokens, expected in zip(bank.values(), banks[0].values(), strict=True):
            check_close(tokens, expected)
    for found, expected in zip(ista2.lenders(model, x).values(), lent.values(), strict=True):
        check_close(found.weight, expected.weight)


def test_what_the_batch_changes_is_linear_in_memory():
    "Four times the batch needs four times the memory, the scores of all pairs included."
    from vitlit.cost import peak_memory

    class Held(nn.Module):
        def __init__(self, v):
            super().__init__()
            self.v, self.align = nn.Parameter(v), ista2.Alignment(None).train()

        def forward(self, x):
            return self.align(self.v, Grid(14, 14), Grid(14, 14))

    small, large = (peak_memory(Held(torch.randn(n, 2, 196, 32)), torch.empty(n)) for n in (16, 64))
    assert large / small < 4.5


def test_input_of_other_images_does_not_matter_inside_references():
    model = create_model('ista2_swin_micro').double().eval()
    x = reference_input('conformance', 3, 64)
    bank = ista2.build_references(model, reference_input('references', 6, 64))
    image = x.clone().requires_grad_()
    with ista2.references(model, bank):
        (g,) = torch.autograd.grad(model(image)[0].square().sum(), image)
    assert g[0].any() and not g[1:].any()
    (g,) = torch.autograd.grad(model(image)[0].square().sum(), image)
    assert all(one.any() for one in g)  # without it, gradients reach the others
