"""SP-ViT beyond its page: every record of the authors' code, training forms included.

The released code has maps *qk* and *v* of its own where ours has *qkv*; both are put together out
of the record's tensors here, so that each of them has the gradient that was recorded.
Records that need more memory than two processes share run in the lane `parity` (VITLIT_LARGE=1).
"""

import os
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import vitlit.models  # noqa: F401  registers the models
from vitlit.core import to_image
from vitlit.layers import offset_pairs, PatchEmbed
from vitlit.papers import spvit
from vitlit.papers.lvvit import MixToken
from vitlit.papers.spvit import prepare, SPViT, SPViTConfig, variants
from vitlit.records import check_record, fill, load_record, records_path
from vitlit.weights import load_official

RECORDS = sorted(
    p.stem for p in (records_path() / 'spvit').glob('spvit_*.json') if not p.stem.endswith('train')
)
if os.environ.get('VITLIT_LARGE') != '1':
    RECORDS = [name for name in RECORDS if name not in ('spvit_m_384', 'spvit_l_384')]
SMALL = SPViTConfig(384, 16, 6, class_at=10)  # what the released main.py makes of its other names
OTHERS = dict(
    spvit_s_224_local0=(replace(variants['s'], class_at=0), {}),
    spvit_s_224_local16=(replace(variants['s'], class_at=16), dict(faithful=True)),
    spvit_lvvit_224=(SMALL, dict(token_head=False)),
    spvit_vit_224=(replace(SMALL, skip_lam=1.0), dict(token_head=False, stem=PatchEmbed)),
    spvit_x_224=(SPViTConfig(216, 10, 9, mlp_ratio=4.0, class_at=10), dict(faithful=True)),
    spvit_x_224_local8=(SPViTConfig(216, 10, 9, mlp_ratio=4.0, class_at=8), {}),
)


def model_of(name, reference):
    config, options = OTHERS.get(name, (None, {}))
    size = dict(img_size=reference['size'])
    if config is not None:
        return SPViT(config, **size, **options)
    size |= dict(faithful=True) if name.startswith('spvit_l') else {}
    return getattr(spvit, name.rsplit('_', 1)[0])(**size)


def official_tensors(model, state):
    "Our tensors by the authors' names, and those of ours that are made out of theirs."
    rules, own = model.name_rules[0], dict(model.named_parameters())
    apart = {k: t.requires_grad_() for k, t in state.items() if re.search(r'\.attn\.(qk|v)\.', k)}
    made = {k: t for k, t in prepare(state, model).items() if '.attn.qkv.' in k and k not in state}
    joined = {rules.rename(k): t for k, t in made.items()}
    rest = {k: own[rules.rename(k)] for k in state if rules.rename(k) in own}
    return rest | apart, joined


def watched(model):
    "A dictionary that the model's next forward pass fills with what the records hold."
    out = {}

    def keep(module, name, change=lambda y, args: y[0] if isinstance(y, tuple) else y):
        module.register_forward_hook(lambda m, args, y: out.update({name: change(y, args)}))

    keep(model.stem, 'patch_embed', lambda y, args: to_image(*y))
    for i, block in enumerate(model.stages[0].blocks):
        keep(block, f'block{i}')
    first = model.stages[0].blocks[0]
    keep(first.token_mixer.op, 'block0.attn')
    keep(first.channel_mixer, 'block0.after_mlp')
    score = first.token_mixer.op.score
    if score is not None:
        h, w = model.embed.grid.size
        prior = offset_pairs(score.table_of(h, w), h, w)
        out |= {'block0.prior': prior, 'block0.prior_query_row3_col5': prior[:, 3 * w + 5]}
    keep(model.norm, 'norm')
    return out


@pytest.mark.parametrize('name', RECORDS)
def test_parity(name):
    reference = load_record(f'spvit/{name}')

    def run(state, x):
        model = model_of(name, reference).double().eval()
        assert load_official(model, state).source == 'official'
        tensors, joined = official_tensors(model, state)
        out = watched(model)
        logits = torch.func.functional_call(model, joined, (x,))
        return dict(logits=logits, **out), tensors

    recorded, skip = reference['outputs'], ()
    if name.endswith('local0'):  # with a class token the authors write over what was recorded
        skip = ('block0.after_mlp',)
        assert recorded['block0'] == recorded['block0.after_mlp']
    deviations = check_record(run, reference, skip=skip)
    assert {'logits', 'norm', 'loss', 'grad input', 'grad pos_embed'} <= deviations.keys()
    print(f'{name}: {len(deviations)} quantities, largest {max(deviations.values()):.1e}')


def token_loss(cls, tokens, box, target, dense_weight=1.0):
    "The loss of token labels (B, K, N + 2), or of labels (B, K) for all tokens of an image."
    top, left, bottom, right = box.tolist()
    lam = 1 - (bottom - top) * (right - left) / tokens.shape[1]
    if target.ndim == 2:
        whole, each = target, target.unsqueeze(1).expand(-1, tokens.shape[1], -1)
    else:
        whole, each = target[..., 1], target[..., 2:].transpose(1, 2)
    whole = lam * whole + (1 - lam) * whole.flip(0)

    def entropy(logits, target):
        return -(target * F.log_softmax(logits, -1)).sum(-1).mean()

    return entropy(cls, whole) + dense_weight * entropy(tokens, each)


def test_training_form():
    "Logits of both heads in training mode, with the box that was drawn, and the loss of labels."
    reference = load_record('spvit/spvit_s_224_train')

    def run(state, x):
        model = spvit.spvit_s(img_size=reference['size']).double().train()
        load_official(model, state)
        model.set_dense_training()
        model.tokens_hook = MixToken(tuple(reference['bbb'])).train()
        tensors, joined = official_tensors(model, state)
        out = watched(model)
        got = torch.func.functional_call(model, joined, (x,))
        assert got.box.tolist() == reference['bbb']
        B, N, K = got.tokens.shape
        target = (3 * fill('target', (B, K, N + 2))).softmax(1)
        losses = dict(
            tl_loss=token_loss(*got, target),
            tl_loss_2d_target=token_loss(*got, (3 * fill('target2', (B, K))).softmax(1)),
            tl_loss_dense_half=token_loss(*got, target, 0.5),
        )
        statistics = {
            f'patch_embed.bn1.{n}': getattr(model.stem.bn1, n)
            for n in ('running_mean', 'running_var')
        }
        out |= dict(x_cls=got.logits, x_aux=got.tokens, loss=losses['tl_loss'])
        return out | losses | statistics, tensors

    deviations = check_record(run, reference)
    assert {'x_cls', 'x_aux', 'tl_loss', 'loss', 'grad cls_token'} <= deviations.keys()
    print(f'{len(deviations)} quantities, largest {max(deviations.values()):.1e}')
