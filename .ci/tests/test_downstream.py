"""The cases of the dense records that do not fit into a page's minute.

`nbs/downstream/61_segmentation` shows the smaller ones, with intermediate quantities.
"""

import os
import zlib

import pytest
import torch
from torch import nn

from vitlit.downstream.segmentation import FCNHead, pixel_loss, segment, slide, UPerHead, upernet
from vitlit.records import deviation, load_record, Reference, reference_input
from vitlit.weights import load_official

large = pytest.mark.skipif(os.environ.get('VITLIT_LARGE') != '1', reason='parity lane')


@large
@pytest.mark.parametrize('name', ['seg_uper_512_t', 'seg_uper_256_lvvit_s'])
def test_heads_on_larger_maps(name):
    record = load_record(f'downstream/{name}')
    decode = UPerHead(record['in_channels'], 150, record['channels'])
    aux = FCNHead(record['in_channels'][2], 150, record['aux_channels'])
    heads = nn.ModuleDict(dict(decode_head=decode, auxiliary_head=aux)).double().eval()
    heads.load_state_dict(Reference(record).state(), strict=False)
    case = next(c for c in record['cases'] if '128x192' in c['tag'])
    shapes = [(i['tag'], i['shape']) for i in case['inputs']]
    maps = [reference_input(t, s[0], s[2:], s[1]).requires_grad_() for t, s in shapes]
    b, y, x = torch.meshgrid(*map(torch.arange, case['labels']['shape']), indexing='ij')
    labels = (7 * y + 13 * x + 31 * b + x * y) % 160
    labels = labels.masked_fill(labels >= 150, 255)
    logits = dict(logits=heads['decode_head'](maps), aux_logits=heads['auxiliary_head'](maps[2]))
    gaps = [deviation(logits[k], ref) for k, ref in case['outputs'].items()]
    loss = pixel_loss(logits['logits'], labels) + 0.4 * pixel_loss(logits['aux_logits'], labels)
    gaps.append(abs(loss.item() / case['loss']['total'] - 1))
    own = dict(heads.named_parameters()) | {f'input.{i}': m for i, m in enumerate(maps)}
    grads = torch.autograd.grad(loss, [own[k] for k in case['grad_l2']])
    norms = zip(grads, case['grad_l2'].values(), strict=True)
    gaps += [abs(float(g.norm()) / ref - 1) for g, ref in norms]
    assert len(gaps) > 15 and max(gaps) < 1e-9


@large
def test_windows_over_dwnet():
    record = load_record('downstream/seg_full_upernet_dwnet_tiny')
    net = upernet('dwnet_tiny').double().eval()
    load_official(net, record.state())
    case = record['cases'][0]
    batch, _, *size = case['input']['shape']
    image, ref = reference_input(case['tag'], batch, size), case['slide']
    with torch.no_grad():
        logits = slide(net, image, 64, 43)
        whole = slide(net, image, 512, 341)
    p = segment(net, image, case['whole']['ori_shape'], 64, 43)
    gaps = [
        deviation(logits, ref['logits_before_rescale']),
        deviation(p, ref['probabilities']),
        deviation(whole, case['slide_crop_larger_than_image']),
    ]
    assert max(gaps) < 1e-9
    assert zlib.crc32(p.argmax(1).numpy().tobytes()) == ref['argmax_crc32']
