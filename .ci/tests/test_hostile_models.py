"""Malformed and hostile input to models, parts and checkpoints.

Each is answered by one sentence that says what was given and what to do, and whatever was refused
is afterwards as it was before.
"""

import io
import os
import pickle
import struct
import zipfile
from functools import partial

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import nn

import vitlit.models  # noqa: F401  files all names
from vitlit import registry
from vitlit.registry import build, create_model, list_models, list_parts, model_info, register_part
from vitlit.weights import load_official, read_state, save_weights

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')
HOSTS = ('pit_micro', 'deit_micro', 'swin_micro', 'mixer_micro', 'swat_vit_micro')
HOSTS += ('swat_swin_micro',)


def refused(action, error, *words):
    "`action` raises `error` with one sentence that holds all `words`."
    with pytest.raises(error) as caught:
        action()
    e = caught.value
    told = str(e.args[0] if isinstance(e, KeyError) else e)
    assert type(e).__module__ == 'builtins' and '\n' not in told and len(told) < 420, told
    assert told.rstrip().endswith(('.', '?')), told
    missing = [w for w in map(str, words) if w not in told]
    assert not missing, f'{missing} not in: {told}'


def table(*rows, name='case'):
    "Parametrize a test by rows (id, anything more)."
    return pytest.mark.parametrize(name, [pytest.param(r[1:], id=str(r[0])) for r in rows])


def draw(name='pit_micro', seed=0, **options):
    torch.manual_seed(seed)
    return create_model(name, **options).eval()


def images(n=2, size=64, channels=3):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(0))


def snapshot(model):
    "All that a refusal must leave: numbers, modules, settings, and what the model answers."
    numbers = {k: v.clone() for k, v in model.state_dict().items()}
    kinds = {n: type(m) for n, m in model.named_modules()}
    facts = model.num_classes, model.global_pool, model.img_size, model.head.num_classes
    return numbers, kinds, facts, model.trained, model.feature_info


def check_same(model, before):
    now = snapshot(model)
    assert now[1:] == before[1:] and now[0].keys() == before[0].keys()
    assert all(torch.equal(now[0][k], v) for k, v in before[0].items())
    with torch.no_grad():
        model(torch.zeros(1, 3, *model.img_size))


# -- building -------------------------------------------------------------------------------------

SIZES = (0, -1, 64.0, '64', [64], (64, 64, 3), (64, -64), (64, 'x'), True, {}, float('nan'))
SIZES += (np.float32(64), np.array([64, 64]), (64, 64.0), torch.tensor(64))
RATES = ('drop_rate', 'pos_drop_rate', 'proj_drop_rate', 'attn_drop_rate', 'drop_path_rate')
VALUES = [
    *[('img_size', v, 'positive integer') for v in SIZES],
    *[('img_size', v, 'smaller than one 8-pixel patch') for v in (7, (8, 1))],
    *[('in_chans', v, 'whole number, 1 or more') for v in (0, -1, '3', 3.0, None, True)],
    *[('num_classes', v, 'whole number below') for v in (-1, '10', 10.0, [10], True, 2**31, None)],
    *[(k, v, 'number from 0 to 1') for k in RATES for v in (1.5, -0.1, 'x', None, float('nan'))],
    *[('distilled', v, 'True or False') for v in ('yes', 1, None)],
    *[('global_pool', v, "'token' or 'avg' or ''") for v in ('max', None, 3)],
    *[('depths', v, 'such as (2, 4, 1)') for v in ('x', 3, ())],
    *[('depths', v, 'whole number, 1 or more') for v in ((0, 0, 0), (2, -1, 1), (1.5, 1, 1))],
    ('depths', (1, 2), 'give depths and heads together'),
    *[('heads', v, 'heads') for v in (0, (0, 1, 2), (1, 2))],
    *[(k, v, 'whole number, 1 or more') for k in ('patch', 'stride') for v in (0, -3, 1.5, 'x')],
    *[('mlp_ratio', v, 'number above 0') for v in (0, -1, 'x', float('nan'), float('inf'))],
    ('mlp_ratio', 0.001, 'give a larger one'),
    ('dtype', 'float', 'torch.float16'),
    ('dtype', torch.int8, 'torch.float16'),
    ('device', 'tpu', "'meta'"),
    ('device', [], "'meta'"),
    ('pretrained', 'yes', 'True or False'),
    ('pretrained_cfg', 'imagenet', "it has 'scenes', 'digits'"),
    ('pretrained_cfg', 3, "it has 'scenes', 'digits'"),
]
OTHERS = [
    ('deit_micro', 'depth', 0, 'whole number, 1 or more'),
    ('deit_micro', 'depth', -1, 'whole number, 1 or more'),
    ('deit_micro', 'dim', 0, 'whole number, 1 or more'),
    ('deit_micro', 'dim', 95, 'choose a number of heads that does'),
    ('deit_micro', 'heads', 0, 'whole number, 1 or more'),
    ('deit_micro', 'class_token', 'no', 'True or False'),
    ('swin_micro', 'window', 0, 'whole number, 1 or more'),
    ('swin_micro', 'window', 2.5, 'whole number, 1 or more'),
    ('mixer_micro', 'token_ratio', 0, 'number above 0'),
    ('mixer_micro', 'drop_path_rate', 2, 'number from 0 to 1'),
    ('swat_vit_micro', 'inner', 0, 'whole number, 1 or more'),
    ('swat_vit_micro', 'kernel', 2, 'must be odd'),
    ('swat_vit_micro', 'merged', 'x', 'True or False'),
    ('swat_vit_micro', 'img_size', 66, '66'),
    ('swat_swin_micro', 'img_size', 63, '63'),
    ('swat_swin_micro', 'img_size', (64, 40), '40'),
]


@table(
    *[(f'pit_micro {k}={v!r}'[:60], 'pit_micro', k, v, words) for k, v, words in VALUES],
    *[(f'{name} {k}={v!r}', name, k, v, words) for name, k, v, words in OTHERS],
)
def test_values(case):
    "Values that make no model; the meta device, on which nothing is allocated, refuses them too."
    name, option, value, words = case
    refused(lambda: create_model(name, **{option: value}), ValueError, words)
    if option != 'device':
        refused(lambda: create_model(name, device='meta', **{option: value}), ValueError, words)


@table(
    ('misspelled', 'num_class', 3, "'num_classes'"),
    ('unknown', 'nonsense', 1, 'no option'),
    ('of another family', 'class_token', True, 'no option'),
    ('slot misspelled', 'mixr', 'attention', "'mixer'"),
    ('name of a part', 'mixer', 'attention', 'build('),
    ('number for a part', 'mixer', 3, 'build('),
    ('attention no dictionary', 'attention', 3, 'dictionary of makers'),
)
def test_options(case):
    option, value, words = case
    entry = vitlit.models.pit_micro
    refused(lambda: entry(**{option: value}), TypeError, 'pit_micro', words)
    refused(lambda: create_model('pit_micro', **{option: value}), TypeError, 'pit_micro', words)


@table(
    ('misspelled', 'pit_mirco', KeyError, "'pit_micro'"),
    ('empty', '', KeyError, 'no vitlit model'),
    ('upper case', 'PIT_MICRO', KeyError, 'no vitlit model'),
    ('space', ' pit_micro', KeyError, "'pit_micro'"),
    ('none', None, TypeError, 'list_models()'),
    ('number', 3, TypeError, 'list_models()'),
    ('unknown tag', 'pit_micro.imagenet', ValueError, "'scenes', 'digits'"),
    ('two tags', 'pit_micro.scenes.v2', ValueError, "'scenes', 'digits'"),
)
def test_names(case):
    name, error, words = case
    for action in (create_model, build, partial(create_model, pretrained=True)):
        refused(lambda: action(name), error, words)


def test_never_released():
    refused(lambda: create_model('mixer_micro', pretrained=True), ValueError, 'none were ever')


def grow(**kw):
    return 3


def nothing(**kw):
    return None


@table(
    ('misspelled part', dict(mixer='structured_atention'), ValueError, "'structured_attention'"),
    ('part that does not fit', dict(mixer='token_mlp'), ValueError, 'pit_micro cannot take'),
    ('merging in pit', dict(transition='merging'), ValueError, 'transition'),
    ('unknown slot', dict(mixr='attention'), TypeError, "'mixer'"),
    ('empty name', dict(mixer=''), ValueError, "''"),
    ('number', dict(mixer=3), TypeError, 'takes a class or a function'),
    ('none', dict(mixer=None), TypeError, 'takes a class or a function'),
    ('a linear map', dict(mixer=nn.Linear), ValueError, 'asks for in_features'),
    ('makes a number', dict(mixer=grow), TypeError, 'grow makes 3', 'let it return one'),
    ('makes nothing', dict(channel=nothing), TypeError, 'nothing makes None'),
    ('unknown option', dict(mixer='structured_attention', num_class=3), TypeError, 'num_class'),
    ('impossible value', dict(mixer=nn.Identity, img_size=0), ValueError, 'img_size'),
)
def test_build(case):
    options, error, *words = case
    refused(lambda: build('pit_micro', **options), error, *words)


@table(
    ('part number', lambda: register_part('mixer', 3), TypeError, 'text'),
    ('slot number', lambda: register_part(3, 'mixer'), TypeError, 'text'),
    ('pattern number', lambda: list_models(3), TypeError, "'pit_*'"),
    ('pattern none', lambda: list_models(None), TypeError, "'pit_*'"),
    ('family number', lambda: list_models(family=3), TypeError, "'PiT'"),
    ('family unknown', lambda: list_models(family='ResNet'), ValueError, 'there are '),
    ('slot unknown', lambda: list_parts('mixr'), ValueError, "'mixer'"),
    ('info none', lambda: model_info(None), TypeError, 'list_models()'),
    ('info unknown', lambda: model_info('pit'), KeyError, "'pit_"),
)
def test_registry(case):
    action, error, words = case
    refused(action, error, words)


def test_register_twice():
    "Another part or model under a known name is refused; the same one, defined anew, replaces it."

    class First(nn.Module):
        pass

    class Second(nn.Module):
        pass

    register_part('mixer', 'probe')(First)
    words = 'already the mixer First', 'for Second'
    refused(lambda: register_part('mixer', 'probe')(Second), ValueError, *words)
    assert registry._parts['mixer']['probe'] is First
    Second.__name__ = 'First'
    register_part('mixer', 'probe')(Second)
    assert registry._parts['mixer'].pop('probe') is Second
    card = model_info('pit_micro')

    def pit_micro():
        pass

    refused(lambda: registry.register(card)(pit_micro), ValueError, 'already a model of')
    refused(lambda: registry.register(card)(nothing), ValueError, 'give both one name')
    assert model_info('pit_micro') is card and create_model('pit_micro', device='meta')


@table(
    ('img_size np.int64', dict(img_size=np.int64(32)), (2, 10)),
    ('img_size torch.Size', dict(img_size=torch.Size((32, 32))), (2, 10)),
    ('in_chans np.int64', dict(img_size=32, in_chans=np.int64(3)), (2, 10)),
    ('num_classes np.int64', dict(img_size=32, num_classes=np.int64(7)), (2, 7)),
    ('num_classes 0', dict(img_size=32, num_classes=0), (2, 128)),
    ('num_classes 1', dict(img_size=32, num_classes=1), (2, 1)),
    ('rate 1', dict(img_size=32, drop_rate=1), (2, 10)),
    ('depths list', dict(img_size=32, depths=[1, 1, np.int64(1)]), (2, 10)),
)
def test_values_that_work(case):
    options, shape = case
    model = draw(**options)
    assert type(model.num_classes) is int and type(model.in_chans) is int
    assert all(type(n) is int for n in model.img_size)
    assert model(images(size=32)).shape == shape
    assert timm.create_model('pit_micro', **options).eval()(images(size=32)).shape == shape


# -- images ---------------------------------------------------------------------------------------


@table(
    ('bytes', lambda: (images() * 255).byte(), ValueError, 'divide bytes by 255'),
    ('whole numbers', lambda: images().long(), ValueError, 'floating point'),
    ('bool', lambda: images() > 0, ValueError, 'floating point'),
    ('complex', lambda: images().cfloat(), ValueError, 'floating point'),
    ('no batch', lambda: images()[0], ValueError, 'add the batch axis'),
    ('one channel of it', lambda: images()[0, 0], ValueError, 'add the batch axis'),
    ('five axes', lambda: images()[None], ValueError, 'batch of images'),
    ('a number', lambda: torch.tensor(1.0), ValueError, 'batch of images'),
    ('channels last', lambda: images().movedim(1, -1), ValueError, 'batch of images'),
    ('no channels', lambda: images(channels=0), ValueError, 'in_chans'),
    ('one channel', lambda: images(channels=1), ValueError, 'in_chans=1'),
    ('another size', lambda: images(size=63), ValueError, 'set_input_size((63, 63))'),
    ('list', lambda: [[1.0]], TypeError, 'list', 'tensor'),
    ('none', lambda: None, TypeError, 'NoneType', 'tensor'),
    ('numpy', lambda: images().numpy(), TypeError, 'ndarray', 'tensor'),
    ('path', lambda: 'image.png', TypeError, 'str', 'load_image'),
)
def test_images(case):
    make, error, *words = case
    model = draw()
    for call in (model, model.forward_features, model.forward_intermediates):
        refused(lambda: call(make()), error, *words)


@pytest.mark.parametrize('name', HOSTS)
def test_images_that_work(name):
    "No image at all, images that share memory, and NaN, which must not look like an answer."
    model = draw(name)
    with torch.no_grad():
        assert model(images(0)).shape == (0, 10)
        torch.testing.assert_close(model(images(1).expand(3, -1, -1, -1))[2:], model(images(1)))
        assert model(images(1) * torch.nan).isnan().all() or not model.head.fc.weight.any()


# -- other sizes, heads and depths ----------------------------------------------------------------


@pytest.mark.parametrize(
    'size', [0, -3, 'x', None, 3.5, (64,), [1, 2, 3], (1, 0), (64, None)], ids=str
)
@pytest.mark.parametrize('name', HOSTS)
def test_input_sizes(name, size):
    model = draw(name)
    before = snapshot(model)
    refused(lambda: model.set_input_size(size), ValueError, repr(size), 'positive integer')
    check_same(model, before)


@table(
    ('pit patch', lambda: draw('pit_micro'), 5, 'patch'),
    ('swat stem', lambda: draw('swat_vit_micro'), 66, '66'),
    ('swat pyramid', lambda: draw('swat_swin_micro'), (64, 72), '72'),
    ('token perceptron', lambda: draw('mixer_micro'), 72, 'places'),
    (
        'second slot',
        lambda: build('swin_micro', transition='structured_merging'),
        (72, 64),
        'multiples of 32',
    ),
    ('stem in a host', lambda: build('deit_micro', stem='structured'), 66, '66'),
)
def test_sizes_that_do_not_fit(case):
    make, size, words = case
    model = make().eval()
    before = snapshot(model)
    refused(lambda: model.set_input_size(size), ValueError, words)
    check_same(model, before)


HEADS = [
    (-1, 'avg'),
    ('10', 'avg'),
    (2.5, ''),
    (True, None),
    (None, None),
    (5, 'max'),
    ([3], 'avg'),
]


@pytest.mark.parametrize('classes, pool', [*HEADS, (10**12, None)], ids=str)
def test_classifiers(classes, pool):
    model = draw()
    before = snapshot(model)
    words = "pools by 'token'" if pool == 'max' else 'num_classes'
    refused(lambda: model.reset_classifier(classes, pool), ValueError, words)
    check_same(model, before)


@pytest.mark.parametrize('indices', [99, 0, -1, [3], [-4], 'all', [], 1.5, ['a']], ids=str)
@pytest.mark.parametrize('name', ['pit_micro', 'swin_micro'])
def test_taps(name, indices):
    model = draw(name)
    before = snapshot(model)
    words = 'this model has 3 taps', 'how many of the last ones'
    refused(lambda: model.prune_intermediate_layers(indices), ValueError, *words)
    refused(lambda: model.forward_intermediates(images(), indices), ValueError, *words)
    check_same(model, before)


def test_pruned_pyramids_lose_their_classifier():
    "It was made for the channels of the last stage, whatever `prune_head` says."
    model = draw()
    model.prune_intermediate_layers([0], prune_head=False)
    assert (model.num_classes, model(images()).shape[-1]) == (0, 32)
    model.reset_classifier(4, 'avg')
    assert model(images()).shape == (2, 4)


@table(
    ('stage 9', lambda m: m.geometry(9), 'from -3 to 2'),
    ('stage none', lambda m: m.geometry(None), 'from -3 to 2'),
    ('size of text', lambda m: m.geometry(0, 'x'), 'positive integer'),
    ('format', lambda m: m.forward_intermediates(images(), output_fmt='x'), "'NCHW' or 'NLC'"),
    ('norm of a pyramid', lambda m: m.forward_intermediates(images(), norm=True), 'leave it'),
    ('distilled training', lambda m: m.set_distilled_training(), '_distilled'),
)
def test_calls(case):
    call, words = case
    refused(lambda: call(draw()), ValueError, words)


def test_interrupted_resizing_changes_nothing():
    model = draw()
    before = snapshot(model)

    def stop(grid):
        raise KeyboardInterrupt

    model.stages[2].blocks[0].set_input_size = stop
    with pytest.raises(KeyboardInterrupt):
        model.set_input_size(96)
    del model.stages[2].blocks[0].set_input_size
    check_same(model, before)


# -- checkpoints ----------------------------------------------------------------------------------


def state(**more):
    return {**draw(seed=3).state_dict(), **more}


def change(name, fn):
    return state(**{name: fn(state()[name])})


def every(fn):
    return {k: fn(v) for k, v in state().items()}


def without(*names):
    return {k: v for k, v in state().items() if k not in names}


def quantized(t):
    return torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)


PLAIN = 'give a file that holds plain, finite numbers'
STATES = [
    ('one missing', lambda: without('norm.weight'), 'missing norm.weight', 'build the variant'),
    ('one too many', lambda: state(extra=torch.zeros(1)), 'unknown extra', 'build the variant'),
    ('transposed', lambda: change('head.fc.weight', torch.t), '(128, 10) instead of (10, 128)'),
    ('renamed', lambda: {f'x.{k}': v for k, v in state().items()}, 'list_models()'),
    (
        'a number for a vector',
        lambda: change('norm.weight', lambda t: t[0]),
        '() instead of (128,)',
    ),
    ('one NaN', lambda: change('norm.weight', lambda t: t * torch.nan), 'not finite norm', PLAIN),
    ('all infinite', lambda: every(lambda t: t * torch.inf), 'not finite', PLAIN),
    ('complex', lambda: every(torch.Tensor.cfloat), 'complex64', PLAIN),
    ('whole numbers', lambda: every(torch.Tensor.long), 'int64', PLAIN),
    ('bytes', lambda: every(torch.Tensor.byte), 'uint8', PLAIN),
    ('bool', lambda: every(lambda t: t > 0), 'bool', PLAIN),
    ('meta', lambda: every(lambda t: t.to('meta')), 'without plain numbers', PLAIN),
    ('one meta', lambda: change('norm.weight', lambda t: t.to('meta')), 'norm.weight', PLAIN),
    ('sparse', lambda: change('head.fc.weight', lambda t: t.to_sparse()), 'head.fc.weight', PLAIN),
    ('quantized', lambda: change('norm.weight', quantized), 'norm.weight', PLAIN),
    ('table not square', lambda: change('embed.pos_embed', lambda t: t[:, :63]), 'set_input_size'),
    ('table too narrow', lambda: change('embed.pos_embed', lambda t: t[..., :7]), 'pos_embed'),
    ('table of two axes', lambda: change('embed.pos_embed', lambda t: t[0]), 'pos_embed'),
    ('table empty', lambda: change('embed.pos_embed', lambda t: t[:, :0]), 'pos_embed'),
    ('table complex', lambda: change('embed.pos_embed', lambda t: t[:, :64].cfloat()), 'pos_embed'),
    ('a list', lambda: state(**{'norm.weight': [1.0, 2.0]}), 'missing norm.weight'),
    ('numpy', lambda: every(torch.Tensor.numpy), 'under names', 'ndarray'),
    ('whole number as name', lambda: state() | {0: torch.zeros(1)}, '0: Tensor', 'state_dict()'),
    ('none as name', lambda: {None: torch.zeros(1)}, 'None: Tensor', 'state_dict()'),
    ('with and without module.', lambda: state(**{'module.norm.weight': torch.ones(128)}), 'twice')[
        :2
    ]
    + ('with and without',),
    ('old and new name', lambda: state(**{'embed.table': state()['embed.pos_embed']}), 'two names'),
    ('two state dicts', lambda: dict(model=state(), model_ema=state()), "['model_ema']"),
    ('empty', lambda: {}, 'holds nothing', 'state_dict()'),
    ('empty wrapper', lambda: dict(model={}), 'state_dict()'),
    ('wrapped module', lambda: dict(model=draw()), "'model': PiT", 'state_dict()'),
    ('module', draw, 'is a PiT', 'state_dict()'),
    ('none', lambda: None, 'NoneType', 'path or a state dict'),
    ('number', lambda: 3, 'is a int', 'path or a state dict'),
    ('tensor', lambda: torch.zeros(2), 'Tensor', 'path or a state dict'),
    ('wrapped three times', lambda: dict(a=dict(model=dict(a={}))), 'under names'),
]


@table(*STATES)
def test_states(case):
    make, *words = case
    model, source = draw(), make()
    before = snapshot(model)
    refused(lambda: load_official(model, source), ValueError, *words)
    check_same(model, before)


def test_partial_loads_are_not_trained():
    model = draw()
    load_official(model, state())
    assert model.trained
    report = load_official(model, without('norm.weight'), strict=False)
    assert report.missing == ['norm.weight'] and model.trained is None
    model = draw()
    load_official(model, {k: v for k, v in state().items() if 'head' not in k}, strict=False)
    assert model.trained is False
    before = snapshot(model)
    refused(
        lambda: load_official(model, dict(a=torch.zeros(1)), False), ValueError, 'no model here'
    )
    check_same(model, before)


@table(
    ('half', lambda: every(torch.Tensor.half)),
    ('bfloat16', lambda: every(torch.Tensor.bfloat16)),
    ('double', lambda: every(torch.Tensor.double)),
    *[(w, partial(lambda w: {w: state(), 'epoch': 3}, w)) for w in ('model', 'state_dict')],
    ('model_ema', lambda: dict(model_ema=state(), state_dict={}, opt=dict(lr=1))),
    ('wrapped twice', lambda: dict(model=dict(state_dict=state()))),
    ('module.', lambda: {f'module.{k}': v for k, v in state().items()}),
    ('compiled', lambda: {f'_orig_mod.{k}': v for k, v in state().items()}),
    ('parameters', lambda: dict(draw(seed=3).named_parameters())),
)
def test_states_that_load(case):
    model, source = draw(), case[0]()
    report = load_official(model, source)
    assert not report.missing and model.trained
    want = state()['head.fc.weight']
    torch.testing.assert_close(model.head.fc.weight.detach(), want, rtol=0.01, atol=0.01)


def test_tied_weights(tmp_path):
    "Blocks that share parameters are saved, and loaded from files with either or both names."
    model, other = draw('deit_micro'), draw('deit_micro', seed=1)
    for m in (model, other):
        m.stages[0].blocks[1] = m.stages[0].blocks[0]
    save_weights(model, tmp_path / 'tied.safetensors')
    file = read_state(tmp_path / 'tied.safetensors')
    first = {k: v for k, v in file.items() if '.blocks.1.' not in k}
    for source in (file, first):
        load_official(other, source)
        torch.testing.assert_close(other(images()), model(images()))
    before = snapshot(other)
    apart = draw('deit_micro', seed=2).state_dict()
    refused(lambda: load_official(other, apart), ValueError, 'tied to', 'equal ones')
    check_same(other, before)


# -- files ----------------------------------------------------------------------------------------


class Bomb:
    "Creates a file when it is unpickled."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def stored(value, **kw):
    file = io.BytesIO()
    torch.save(value, file, **kw)
    return file.getvalue()


def header(text, size=None):
    return struct.pack('<Q', len(text) if size is None else size) + text


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as z:
        z.writestr('a.txt', 'x')
    return file.getvalue()


def bomb(folder, protocol=None, **kw):
    value = dict(model=state(), x=Bomb(str(folder / 'EXECUTED')))
    return pickle.dumps(value, protocol) if protocol is not None else stored(value, **kw)


HUGE = b'{"a":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4000000000000]}}'
ODD = b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}'
READ = 'cannot be read as a checkpoint', 'give a .safetensors'
FILES = [
    *[(f'{n} bytes.pth', partial(lambda n, d: stored(state())[:n], n), *READ) for n in (0, 1, 100)],
    ('half.pth', lambda d: stored(state())[: len(stored(state())) // 2], *READ),
    ('one byte short.pth', lambda d: stored(state())[:-1], *READ),
    *[
        (
            f'{n} bytes.safetensors',
            partial(lambda n, d: safetensors.torch.save(state())[:n], n),
            *READ,
        )
        for n in (0, 7, 100, -1)
    ],
    ('text.pth', lambda d: b'these are not weights\n' * 20, *READ),
    ('text.safetensors', lambda d: b'these are not weights\n' * 20, *READ),
    ('text', lambda d: b'these are not weights\n' * 20, *READ),
    ('zip.pth', lambda d: zipped(), *READ),
    ('zip.safetensors', lambda d: zipped(), *READ),
    ('huge header.safetensors', lambda d: header(b'{}', 2**63 - 1), *READ),
    ('long header.safetensors', lambda d: header(b'{}', 10**8), *READ),
    ('lying header.safetensors', lambda d: header(HUGE), *READ),
    ('odd type.safetensors', lambda d: header(ODD) + b'\0' * 4, *READ),
    ('no json.safetensors', lambda d: header(b'not json at all'), *READ),
    ('empty.safetensors', lambda d: safetensors.torch.save({}), 'holds nothing'),
    ('empty.pth', lambda d: stored({}), 'holds nothing'),
    ('list.pth', lambda d: stored([1, 2]), 'is a list'),
    ('tensor.pth', lambda d: stored(torch.zeros(3)), 'is a Tensor'),
    ('no tensor.pth', lambda d: stored(dict(a=1)), "'a': int"),
    ('integer names.pth', lambda d: stored({0: torch.zeros(1)}), '0: Tensor'),
    ('none as name.pth', lambda d: stored({None: torch.zeros(1)}), 'None: Tensor'),
    ('whole model.pth', lambda d: stored(draw()), *READ),
    *[(f'bomb {p}.pth', partial(lambda p, d: bomb(d, p), p), *READ) for p in (0, 2, 4)],
    ('bomb zip.pth', lambda d: bomb(d), *READ),
    ('bomb old.pth', lambda d: bomb(d, _use_new_zipfile_serialization=False), *READ),
    ('bomb.safetensors', lambda d: bomb(d), *READ),
    ('really pth.safetensors', lambda d: stored(state()), *READ),
    ('really safetensors.pth', lambda d: safetensors.torch.save(state()), *READ),
    ('NaN.pth', lambda d: stored(change('norm.weight', lambda t: t * torch.nan)), 'not finite'),
    ('two.pth', lambda d: stored(dict(model=state(), model_ema=state())), 'more than one'),
    ('missing one.pth', lambda d: stored(without('norm.weight')), 'missing norm.weight'),
    ('another of ours.pth', lambda d: stored(draw('swin_micro').state_dict()), '`swin_micro`'),
    ('resnet.pth', lambda d: stored(timm.create_model('resnet10t').state_dict()), 'list_models()'),
]


def by_pretrained(file, create=timm.create_model):
    return create('pit_micro', pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))


@table(*FILES)
def test_files(case, request, tmp_path):
    "Loaded by load_official, by timm's create_model and by ours."
    make, *words = case
    file = tmp_path / request.node.callspec.id
    file.write_bytes(make(tmp_path))
    model = draw()
    before = snapshot(model)
    refused(lambda: load_official(model, file), ValueError, *words)
    check_same(model, before)
    refused(lambda: by_pretrained(file), ValueError, *words)
    refused(lambda: by_pretrained(file, create_model), ValueError, *words)
    assert not (tmp_path / 'EXECUTED').exists()


@table(
    ('missing.pth', lambda p: None),
    ('missing.safetensors', lambda p: None),
    ('folder.pth', lambda p: p.mkdir()),
    ('loop.pth', lambda p: p.symlink_to(p)),
    ('dangling.pth', lambda p: p.symlink_to(p.with_name('nowhere'))),
    ('pipe.pth', lambda p: os.mkfifo(p)),
)
def test_no_files(case, request, tmp_path):
    file = tmp_path / request.node.callspec.id
    case[0](file)
    words = file.name, 'is not a file', 'give the path'
    refused(lambda: load_official(draw(), file), FileNotFoundError, *words)
    refused(lambda: by_pretrained(file), FileNotFoundError, *words)


def test_good_files_load(tmp_path):
    "And through pretrained=True with other channels, classes and sizes, as timm adapts them."
    model, file = draw(seed=3), tmp_path / 'good.safetensors'
    save_weights(model, file)
    same = by_pretrained(file).eval()
    assert same.trained and same.pretrained_cfg['file'] == str(file)
    torch.testing.assert_close(same(images()), model(images()))
    options = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
    other = create_model('pit_micro', in_chans=1, num_classes=7, img_size=96, **options).eval()
    assert other(images(size=96, channels=1)).shape == (2, 7)
    assert other.trained is False  # its classifier is new
    maps = create_model('pit_micro', features_only=True, **options)(images())
    assert [m.shape[1] for m in maps] == [32, 64, 128]
    torch.save(without('norm.weight'), tmp_path / 'part.pth')
    cfg = dict(file=str(tmp_path / 'part.pth'))
    part = create_model('pit_micro', pretrained=True, pretrained_cfg=cfg, pretrained_strict=False)
    assert part.trained is None


@table(
    ('field', dict(pretrained_cfg_overlay=dict(fil='x')), TypeError, "'file'"),
    ('another width', dict(head_dim=8, pretrained=True), ValueError, '`pit_micro`'),
)
def test_configurations(case):
    options, error, words = case
    refused(lambda: create_model('pit_micro', **options), error, words)


# -- weights of another model ---------------------------------------------------------------------


@table(
    ("timm's swin in pit", 'swin_tiny_patch4_window7_224', 'pit_ti', 'into `swin_t`'),
    ("timm's pit in deit", 'pit_s_224', 'deit_s', 'into `pit_s`'),
    ("timm's distilled pit in pit", 'pit_ti_distilled_224', 'pit_ti', 'into `pit_ti_distilled`'),
    ("timm's vit in pit", 'vit_tiny_patch16_224', 'pit_ti', 'into `deit_ti`'),
    ("timm's mixer in resmlp", 'mixer_b32_224', 'resmlp_s12', 'into `mixer_b32`'),
    ("timm's resmlp in mixer", 'resmlp_12_224', 'mixer_s', 'into `resmlp_s12`'),
    ('ours in another of ours', 'deit_micro', 'pit_micro', 'into `deit_micro`'),
    ('host in its paper', 'deit_ti', 'swat_vit_ti', 'into `deit_ti`'),
    ('unknown family', 'resnet10t', 'pit_ti', 'which no model here has'),
)
def test_foreign(case):
    "By names and shapes alone: on the meta device."
    theirs, ours, words = case
    source, _ = timm.create_model(theirs).state_dict(), torch.manual_seed(0)
    model = create_model(ours, device='meta')
    refused(lambda: load_official(model, source), ValueError, f'does not fit {ours}', words)


@table(
    ('classes', dict(num_classes=7), '`pit_micro(num_classes=7)`'),
    ('channels', dict(in_chans=1), '`pit_micro(in_chans=1)`'),
    ('both', dict(num_classes=7, in_chans=4), '`pit_micro(num_classes=7, in_chans=4)`'),
    ('no classes', dict(num_classes=0), '`pit_micro(num_classes=0)`'),
)
def test_other_options(case):
    options, words = case
    model, source = draw(), draw(**options).state_dict()
    before = snapshot(model)
    refused(lambda: load_official(model, source), ValueError, f'build {words}', 'strict=False')
    check_same(model, before)


@table(
    ('vit_tiny_patch16_224', 'deit_ti'),
    ('vit_tiny_patch16_384', 'deit_ti'),
    ('pit_ti_224', 'pit_ti'),
    ('swin_tiny_patch4_window7_224', 'swin_t'),
    ('resmlp_12_224', 'resmlp_s12'),
)
def test_same_architecture(case, request):
    "timm's weights of the same architecture load, whoever trained them."
    theirs = timm.create_model(request.node.callspec.id)
    report = load_official(create_model(case[0]), theirs.state_dict())
    assert not report.missing


# -- saving ---------------------------------------------------------------------------------------


def test_saving(tmp_path):
    model = draw()
    (tmp_path / 'file').write_text('x')
    (tmp_path / 'folder.safetensors').mkdir()
    good = tmp_path / 'new' / 'deep' / 'w.safetensors'
    save_weights(model, good)
    for file, error, words, kw in (
        (tmp_path / 'w.pth', ValueError, 'rename it', {}),
        (tmp_path / 'file' / 'w.safetensors', NotADirectoryError, 'choose another place', {}),
        (tmp_path / 'folder.safetensors', IsADirectoryError, 'name of a file', {}),
        (good, ValueError, 'torch.float16', dict(dtype='half')),
        (good, ValueError, 'torch.float16', dict(dtype=torch.int8)),
    ):
        refused(lambda: save_weights(model, file, **kw), error, words)
    far = create_model('pit_micro', device='meta')
    refused(lambda: save_weights(far, good), ValueError, 'load weights first')
    assert len(read_state(good)) == len(model.state_dict())
    assert sorted(p.name for p in tmp_path.iterdir()) == ['file', 'folder.safetensors', 'new']
