"""Malformed and hostile input to data, learners, explanations of images, and commands.

Each is answered by one sentence that says what was given and what to do; a refused command leaves
nothing behind.
"""

import json
import os
import sys

import numpy as np
import pytest
import timm
import torch
from fastai.vision.learner import vision_learner
from PIL import Image

import vitlit.cli as cli
from vitlit.explain.attribution import explain
from vitlit.models import create_model
from vitlit.train.data import Images, digits, folder, image_loaders, load_image, scenes
from vitlit.train.learner import evaluate, vit_learner
from vitlit.train.recipes import get_recipe
from vitlit.train.scenes import make_scene, scene_batch
from vitlit.weights import save_weights

pytestmark = pytest.mark.filterwarnings('ignore')
REFUSALS = ValueError, TypeError, KeyError, NotImplementedError


def refused(action, *words):
    "`action` raises one sentence that holds all `words`."
    with pytest.raises(REFUSALS) as caught:
        action()
    e = caught.value
    return one_sentence(str(e.args[0] if isinstance(e, KeyError) else e), *words)


def one_sentence(told, *words):
    told = told.strip()
    assert told and '\n' not in told and len(told) < 500, told
    missing = [w for w in map(str, words) if w not in told]
    assert not missing, f'{missing} not in: {told}'
    return told


def cases(name, **rows):
    "Parametrize a test by rows id=value."
    return pytest.mark.parametrize(name, [pytest.param(v, id=k) for k, v in rows.items()])


def draw(path, size=40, seed=0, mode='RGB'):
    noise = np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).convert(mode).save(path)


def tree(root, splits=('train', 'val'), classes=('cat', 'dog'), n=3):
    for split in splits:
        for c in classes:
            for i in range(n):
                draw(root / split / c / f'{i}.png', seed=i)
    return root


def load(root, **kw):
    dls = folder(root, **(dict(size=32, bs=2, num_workers=0, device='cpu') | kw))
    return [len(list(dl)) for dl in dls.loaders]


# images and folders


@cases(
    'write',
    empty=lambda p: p.touch(),
    text=lambda p: p.write_text('hello'),
    page=lambda p: p.write_text('<html>404</html>'),
    noise=lambda p: p.write_bytes(b'\xff\xd8\xff\xe0' + bytes(range(200))),
    dangling=lambda p: p.symlink_to('/nowhere.png'),
    folder=lambda p: p.mkdir(),
)
def test_broken_file(tmp_path, write):
    file = tmp_path / 'odd.png'
    write(file)
    refused(lambda: load_image(file), 'odd.png', 'Cannot read')


@pytest.mark.parametrize('kind', ['png', 'jpg', 'webp'])
def test_cut_file(tmp_path, kind):
    draw(tmp_path / f'a.{kind}', 200)
    whole = (tmp_path / f'a.{kind}').read_bytes()
    (tmp_path / f'a.{kind}').write_bytes(whole[: len(whole) // 2])
    refused(lambda: load_image(tmp_path / f'a.{kind}'), f'a.{kind}')


@pytest.mark.parametrize('kind', ['float32', 'int32'])
def test_pixels_without_a_range(tmp_path, kind):
    Image.fromarray(np.ones((4, 4), kind)).save(tmp_path / 'a.tiff')
    refused(lambda: load_image(tmp_path / 'a.tiff'), 'a.tiff', '0 … 255', '8 bits')


@cases(
    'source',
    none=None,
    number=3,
    list=[1],
    tensor=torch.zeros(3, 4, 4),
    floats=np.zeros((4, 4, 3)),
    bools=np.zeros((4, 4), bool),
    five=np.zeros((4, 4, 5), np.uint8),
    nothing=np.zeros((0, 4, 3), np.uint8),
    line=np.zeros(4, np.uint8),
)
def test_no_image(source):
    refused(lambda: load_image(source), 'array of bytes')


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGBA', 'CMYK'])
def test_every_mode_is_read(tmp_path, mode):
    name = 'a.tiff' if mode == 'CMYK' else 'a.png'
    draw(tmp_path / name, mode=mode)
    assert load_image(tmp_path / name).mode == 'RGB'


@cases(
    'change',
    empty_class=lambda t: [f.unlink() for f in (t / 'train/cat').iterdir()],
    no_val=lambda t: (t / 'val').rename(t / 'held'),
    other_classes=lambda t: (t / 'val/cat').rename(t / 'val/bird'),
    one_more=lambda t: draw(t / 'val/cow/x.png'),
    one_class=lambda t: [(t / s / 'cat').rename(t / s / '.cat') for s in ('train', 'val')],
    val_is_a_file=lambda t: ((t / 'val').rename(t / 'held'), (t / 'val').write_text('x')),
    loop=lambda t: (t / 'train/cat/again').symlink_to(t / 'train/cat'),
    twice=lambda t: (t / 'train/cat/dogs').symlink_to(t / 'train/cat/../cat'),
    leak=lambda t: ((t / 'val').rename(t / 'held'), (t / 'val').symlink_to(t / 'train')),
    leak_of_one=lambda t: (t / 'val/cat/9.png').symlink_to(t / 'train/cat/0.png'),
    all_bad=lambda t: [f.write_text('x') for f in (t / 'train/cat').iterdir()],
)
def test_odd_folder(tmp_path, change):
    change(tree(tmp_path))
    refused(lambda: load(tmp_path, on_bad='skip'))


@cases(
    'change',
    hidden=lambda t: (t / 'train/cat/.h.png').write_text('x'),
    notes=lambda t: (t / 'train/cat/notes.txt').write_text('x'),
    nested=lambda t: draw(t / 'train/cat/deep/er/x.png'),
    newline=lambda t: draw(t / 'train/cat/a\nb.png'),
    one_pixel=lambda t: draw(t / 'train/cat/p.png', 1),
    links=lambda t: (t / 'train/cat/9.png').symlink_to(t / 'train/cat/0.png'),
)
def test_unusual_folder(tmp_path, change):
    change(tree(tmp_path))
    load(tmp_path)


FOLDER = [
    *[('bs', v) for v in (0, -1, 1.5, 'x', None)],
    *[('size', v) for v in (0, 'x', (32,), 1.5)],
    *[('augment', v) for v in ('nonsense', 3)],
    *[('erase', v) for v in (2.0, -1, 'x')],
    *[('valid', v) for v in (20, -0.1, 'train', None)],
    *[('num_workers', v) for v in (-1, 'x')],
    *[('seed', v) for v in ('x', 2**70)],
    ('on_bad', 'ignore'),
    ('cfg', 'pit_micro'),
    ('train', ''),
    ('nonsense', 1),
    ('device', 'tpu'),
    ('scale', (5, 1)),
    ('hflip', 7),
]


@pytest.fixture(scope='module')
def mine(tmp_path_factory):
    return tree(tmp_path_factory.mktemp('mine'))


@pytest.mark.parametrize('name, value', FOLDER, ids=str)
def test_option_of_folder(mine, name, value):
    refused(lambda: load(mine, **{name: value}))


SETS = [
    *[(digits, dict(size=v)) for v in (0, -1, 'x', 1.5)],
    *[(digits, dict(seed=v)) for v in ('x', 2**70)],
    *[(digits, d) for d in (dict(split='x'), dict(bs='x'), dict(augment='x'), dict(mean=(1, 2)))],
    *[(digits, dict(std=v)) for v in ((0, 0, 0), (1, 1))],
    *[(scenes, dict(n_train=v)) for v in (0, 2.5, 'x')],
    *[(scenes, dict(size=v)) for v in (31, 'x', (64,))],
    *[(scenes, dict(difficulty=v)) for v in (-0.1, 2, float('nan'), 'x')],
    *[(scenes, dict(distractors=v)) for v in (4, (2, 1), 'x', 1.5, (0, 1, 2), (0, 1.5))],
    *[(scenes, dict(seed=v)) for v in (-1, 0.5, 2**70)],
    *[(scene_batch, dict(n=2) | d) for d in (dict(start=-5), dict(split='test'), dict(n=2.5))],
    *[(make_scene, dict(i=v)) for v in (-1, 1.5, 2**70)],
]


@pytest.mark.parametrize('fn, options', SETS, ids=lambda v: getattr(v, '__name__', str(v)))
def test_option_of_a_set(fn, options):
    few = dict(n_train=4, n_valid=4, bs=2) if fn is scenes else {}
    refused(lambda: fn(**few | options))


def test_labels_outside_the_vocabulary():
    x = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    refused(lambda: Images(x, torch.tensor([5, 9]), 'ab'), '0 and 1')
    refused(lambda: Images(x, torch.tensor([0, 1, 1]), 'ab'), '2 and 3')
    one = Images(x, torch.tensor([0, 1]), 'ab')
    refused(lambda: image_loaders(one, one, bs=0), 'bs is 0')


# learners


@pytest.fixture(scope='module')
def few():
    return scenes(32, 16, size=32, difficulty=0, bs=16, device='cpu')


LEARNER = [
    ('arch', 'pit_mirco', 'pit_micro'),
    ('recipe', 'mirco', 'micro'),
    *[('n_out', v, 'n_out') for v in (-1, 0, 3, 'x')],
    *[('seed', v, 'seed') for v in ('x', 2**70)],
    ('log_dir', '/proc/nope', 'choose another'),
    ('metrics', 'acc', 'metric'),
    ('pretrained', 'no', 'True or False'),
    ('nonsense', 1, 'nonsense'),
]


@pytest.mark.parametrize('name, value, word', LEARNER, ids=str)
def test_option_of_the_learner(few, name, value, word):
    refused(lambda: vit_learner(few, **{'arch': 'deit_micro', name: value}), word)


@pytest.mark.parametrize('epochs', [0, -1, 'x', 0.5, float('nan'), True])
def test_epochs(few, epochs):
    learn = vit_learner(few, 'deit_micro')
    refused(lambda: learn.fit_recipe(epochs), 'epochs')


def run(learn, **kw):
    with learn.no_bar(), learn.no_logging():
        learn.fit_recipe(2, **kw)


def test_a_loss_that_is_not_finite(few):
    wild = vit_learner(few, 'deit_micro', get_recipe('micro').replace(lr=1e12, clip=None))
    refused(lambda: run(wild), 'step', 'batch', 'epoch')
    assert not wild.model.trained
    model = create_model('deit_micro', img_size=32)
    model.get_classifier().weight.data.fill_(float('nan'))
    refused(lambda: run(vit_learner(few, model)), 'step 1 ', 'weights')
    refused(lambda: evaluate(model, few.valid), 'NaN')
    assert not model.trained


def test_equal_weights_whatever_the_batch(few):
    sets = few, scenes(32, 16, size=32, difficulty=0, bs=4, device='cpu')
    states = [vit_learner(dls, 'deit_micro', seed=3).model.state_dict() for dls in sets]
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states)))


def test_a_second_fit_keeps_the_history(few, tmp_path):
    learn = vit_learner(few, 'deit_micro', log_dir=tmp_path)
    run(learn)
    run(learn)
    rows = (tmp_path / 'history.csv').read_text().splitlines()
    assert [r.split(',')[0] for r in rows] == ['epoch', '0', '1', '2', '3']
    refused(lambda: vit_learner(few, 'deit_micro', log_dir=tmp_path), 'another run')


@pytest.mark.parametrize('name', ['pit_micro', 'swat_swin_micro'])
def test_a_trained_body_without_its_classifier(few, name):
    body = timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    whole = create_model(name, pretrained=True).state_dict()
    assert body and all(torch.equal(v, whole[k]) for k, v in body.items())
    learn = vision_learner(few, name, pretrained=True, img_size=32)
    assert not next(learn.model[0].parameters()).requires_grad  # frozen, because it is trained


# explaining


@pytest.fixture(scope='module')
def net():
    return create_model('pit_micro').eval()


@cases(
    'target',
    ten=10,
    minus=-1,
    word='3',
    share=1.0,
    bool=True,
    three=[1, 2, 3],
    nested=[[1], [2]],
    mixed=[1, 'a'],
    dict={},
)
def test_target(net, target):
    refused(lambda: explain(net, torch.randn(2, 3, 64, 64), target))


@cases(
    'x',
    none=None,
    pil=Image.new('RGB', (64, 64)),
    array=np.zeros((1, 3, 64, 64)),
    one=torch.zeros(3, 64, 64),
    five=torch.zeros(1, 1, 3, 64, 64),
    nan=torch.full((1, 3, 64, 64), float('nan')),
    size=torch.zeros(1, 3, 32, 32),
)
def test_images_to_explain(net, x):
    refused(lambda: explain(net, x))


@cases(
    'options',
    method=dict(method='relevence'),
    start=dict(method='relevance', start_layer=99),
    before=dict(method='relevance', start_layer=-1),
    steps=dict(method='integrated_gradients', steps=0),
)
def test_option_of_explain(net, options):
    refused(lambda: explain(net, torch.randn(1, 3, 64, 64), **options))


# commands


@pytest.fixture
def place(tmp_path, monkeypatch):
    "An empty working directory, and beside it an image and a folder of a run."
    draw(tmp_path / 'p.png', 64)
    here = tmp_path / 'here'
    here.mkdir()
    monkeypatch.chdir(here)
    return here


def refuse(capsys, place, command, keep=(), **kwargs):
    "A command ends with code 1 and one sentence, and leaves nothing."
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        command(**kwargs)
    assert caught.value.code == 1
    left = {p.name for p in place.iterdir()} - set(keep)
    assert not left, left
    return one_sentence(capsys.readouterr().err)


DEMO = [
    *[dict(epochs=v) for v in (-1, 0)],
    *[dict(seed=v) for v in (-1, 2**70)],
    *[dict(model=v) for v in ('pit_mirco', '', 'pit_micro.nosuch', 'swin_t.nope')],
    *[dict(data=v) for v in ('nothing', '', 'Digits', '/etc/passwd', '/dev/null')],
    *[dict(out=v) for v in ('/dev/null', '/dev/null/x', '/proc/x', 'a' * 300)],
    dict(bs=0),
    dict(model='mixer_micro', pretrained=True),
]


@pytest.mark.parametrize('options', DEMO, ids=str)
def test_demo(capsys, place, options):
    refuse(capsys, place, cli.vitlit_demo, quiet=True, **options)


@cases(
    'change',
    one_class=lambda t: [(t / s / 'cat').rename(t / s / '.cat') for s in ('train', 'val')],
    only_val=lambda t: (t / 'train').rename(t / '.train'),
    two_val=lambda t: (t / 'valid').mkdir(),
    bad_image=lambda t: (t / 'train/dog/z.png').write_text('x'),
    bare_images=lambda t: [(t / s).rename(t / f'.{s}') for s in ('train', 'val')],
)
def test_demo_of_a_folder(capsys, place, change):
    change(tree(place.parent / 'mine'))
    refuse(capsys, place, cli.vitlit_demo, data=str(place.parent / 'mine'), quiet=True)


def test_demo_without_room_or_rights(capsys, place, monkeypatch):
    monkeypatch.setattr('shutil.disk_usage', lambda _: type('Usage', (), dict(free=1000)))
    small = tree(place.parent / 'mine')
    told = refuse(capsys, place, cli.vitlit_demo, data=str(small), model='deit_micro', quiet=True)
    assert 'MB free' in told
    monkeypatch.undo()
    monkeypatch.chdir(place)
    monkeypatch.setattr('os.access', lambda *_: False)
    assert 'cannot be written' in refuse(capsys, place, cli.vitlit_demo, quiet=True)


EXPLAIN = [
    *[dict(images=v) for v in (['nope.png'], ['/tmp'], ['/dev/null'], [''], ['../p.png', 'no'])],
    *[dict(method=v) for v in ('x', '')],
    *[dict(model=v) for v in ('x', 'pit_micro.x', '/tmp', 'swin_t.nope')],
    *[dict(target=v) for v in ('99', '-1', 'Disc')],
    *[dict(out=v) for v in ('/dev/null', '/proc/x', '../p.png')],
    dict(model='resnet10t', untrained=True, method='relevance'),
]


@pytest.mark.parametrize('options', EXPLAIN, ids=str)
def test_explain(capsys, place, options):
    refuse(capsys, place, cli.vitlit_explain, **{'images': ['../p.png']} | options)


def test_explain_a_long_name(capsys, place):
    long = place.parent / ('n' * 246 + '.png')
    draw(long)
    refuse(capsys, place, cli.vitlit_explain, images=['../p.png', str(long)])


RUNS = dict(
    no_json='{',
    empty='',
    list='[]',
    no_keys='{}',
    null='null',
    unknown_model=dict(model='rm -rf'),
    model_int=dict(model=3),
    other_model=dict(model='deit_micro'),
    classes_int=dict(classes=3),
    fewer_classes=dict(classes=['a']),
    size_word=dict(img_size='x'),
    size_seven=dict(img_size=[7, 7]),
    gray=dict(in_chans=1),
    weights=b'\0' * 99,
    no_weights=b'',
)


@pytest.mark.parametrize('damage', RUNS.values(), ids=RUNS)
def test_a_damaged_run(capsys, place, net, damage):
    folder = place.parent / 'run'
    folder.mkdir()
    names = list(map(str, range(10)))
    good = dict(model='pit_micro', classes=names, img_size=[64, 64], in_chans=3)
    save_weights(net, folder / 'model.safetensors')
    told = damage if isinstance(damage, str) else json.dumps(good)
    if isinstance(damage, dict):
        told = json.dumps(good | damage)
    (folder / 'run.json').write_text(told)
    if isinstance(damage, bytes):
        (folder / 'model.safetensors').write_bytes(damage)
    refuse(capsys, place, cli.vitlit_explain, images=['../p.png'], model=str(folder))


def test_a_terminal_of_ascii_letters_and_a_reader_that_leaves(capfd, monkeypatch):
    read, write = os.pipe()
    with open(write, 'w', encoding='ascii') as pipe, monkeypatch.context() as m:
        m.setattr(sys, 'stdout', pipe)
        cli.vitlit_models('pit_micro')
        text = os.read(read, 10_000).decode('ascii')
        os.close(read)
        cli.vitlit_models('pit_micro')
    assert 'pit_micro' in text
    assert capfd.readouterr().err == ''
