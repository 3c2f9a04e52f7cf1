"""Malformed and hostile input to the commands `vitlit_segment` and `vitlit_detect`.

Each is answered by one sentence that says what was given and what to do; a refused command leaves
nothing behind.
"""

import json
import shutil

import pytest
from test_hostile_train import draw, one_sentence

import vitlit.cli as cli
from vitlit.downstream.runs import train_dense

pytestmark = pytest.mark.filterwarnings('ignore')
TINY = dict(
    segmentation=('dwnet_micro', ['width=8', 'aux_width=8', 'batch=2']),
    detection=('swat_swin_micro', ['width=8', 'count=8', 'batch=2', 'keep=(9, 5)']),
)
COMMANDS = dict(segmentation=cli.vitlit_segment, detection=cli.vitlit_detect)
both = pytest.mark.parametrize('task', TINY)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "A run of each kind; not to be changed."
    home = tmp_path_factory.mktemp('runs')
    for task, (model, settings) in TINY.items():
        how = dict(settings=settings, steps=1, size=32, quiet=True, out=home / task)
        train_dense(task, model, **how)
    return home


@pytest.fixture
def place(tmp_path, monkeypatch):
    "An empty working directory, and beside it an image."
    draw(tmp_path / 'p.png', 64)
    (tmp_path / 'broken.png').write_bytes(b'\x89PNG\r\n\x1a\n')
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    return tmp_path / 'here'


def refuse(capsys, place, task, *words, **kwargs):
    "A command ends with code 1 and one sentence, and leaves nothing."
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        COMMANDS[task](**kwargs)
    assert caught.value.code == 1
    left = {p.name for p in place.iterdir()}
    assert not left, left
    told = one_sentence(capsys.readouterr().err, *words)
    assert 'VITLIT_TRACEBACK' not in told, told
    return told


TRAIN = [
    *[dict(action=v) for v in ('', 'Train', 'evaluate', '../x')],
    *[dict(model=v) for v in ('', 'x', 'resnet10t', 'dwnet_micro.nope', '/tmp', 'mixer_micro')],
    *[dict(data=v) for v in ('nothing', '', 'Scenes', '/etc/passwd', '/dev/null', '.')],
    *[dict(size=v) for v in (0, -1, 8)],
    *[dict(steps=v) for v in (0, -1)],
    *[dict(every=v) for v in (0, -1)],
    *[dict(seed=v) for v in (-1, 2**70)],
    *[dict(set=[v]) for v in ('', 'x', 'x=1', 'lr', 'lr=', 'lr=-1', 'steps=0', 'batch=x')],
    *[dict(set=[v]) for v in ('every=7', 'width=0', 'width=x', 'drop_path=2')],
    *[dict(out=v) for v in ('/dev/null', '/dev/null/x', '/proc/x', 'a' * 300)],
    dict(workers=-1),
    dict(workers=1, every=1),
    dict(recipe='micro'),
    dict(model='mixer_micro', pretrained=True),
    dict(resume=True),
    dict(resume=True, out='nothing'),
    dict(images=['../p.png']),
    dict(limit=3),
]


@both
@pytest.mark.parametrize('options', TRAIN, ids=str)
def test_train(capsys, place, task, options):
    plain = dict(action='train', model=TINY[task][0], quiet=True)
    refuse(capsys, place, task, **plain | options)


@both
def test_a_folder_in_another_layout(capsys, place, task):
    mine = place.parent / 'mine'
    call = dict(action='train', model=TINY[task][0], data=str(mine))
    (mine / 'annotations').mkdir(parents=True)
    refuse(capsys, place, task, 'There is no', **call)
    if task == 'segmentation':
        for split in ('training', 'validation'):
            for kind in ('images', 'annotations'):
                (mine / kind / split).mkdir(parents=True)
        refuse(capsys, place, task, 'no .jpg file', **call)
        draw(mine / 'images/training/a.jpg')
        draw(mine / 'annotations/training/b.png', mode='L')
        refuse(capsys, place, task, 'no partner', **call)
        return
    for told, words in (('{', 'is no JSON'), ('[]', 'lacks images'), ('{"images": 3}', 'lacks')):
        (mine / 'annotations/instances_train2017.json').write_text(told)
        refuse(capsys, place, task, words, **call)


@both
def test_eval_and_predict(capsys, place, runs, task):
    other = next(t for t in TINY if t != task)
    classifier = place.parent / 'classifier'
    classifier.mkdir()
    told = dict(model='pit_micro', classes=['a', 'b'], img_size=[64, 64], in_chans=3)
    (classifier / 'run.json').write_text(json.dumps(told))
    reader = COMMANDS[other].__name__
    for action in (dict(action='eval'), dict(action='predict', images=['../p.png'])):
        for run, words in {
            'nothing': ('no run in nothing',),
            '/dev/null': ('no run in',),
            '': ('no run in',),
            TINY[task][0]: ('no run in', 'train'),
            str(classifier): ('a run of classification', 'vitlit_eval'),
            str(runs / other): (f'a run of {other}', f'not of {task}', reader),
        }.items():
            refuse(capsys, place, task, *words, model=run, **action)
        for out in ('/dev/null', '/proc/x', '../p.png'):
            refuse(capsys, place, task, '--out', model=str(runs / task), out=out, **action)
    mine = dict(model=str(runs / task), quiet=True)
    for images, word in (([], 'No image'), (['no.png'], 'not a file'), (['/dev/null'], 'file')):
        refuse(capsys, place, task, word, action='predict', images=images, **mine)
    for broken in (['../broken.png'], ['../p.png', '../broken.png']):
        refuse(capsys, place, task, 'broken.png', action='predict', images=broken, **mine)
    for limit in (0, -1):
        refuse(capsys, place, task, 'limit', action='eval', limit=limit, **mine)
    refuse(capsys, place, task, "'x'", action='eval', data='x', **mine)
    odd = dict(recipe='micro', set=['lr=1'], steps=2, size=32, seed=0, resume=True, pretrained=True)
    for name, value in odd.items():
        for action in ('eval', 'predict'):
            refuse(capsys, place, task, f'--{name}', action=action, **mine | {name: value})


@pytest.mark.parametrize('score', [-0.1, 1.1, float('nan')])
def test_a_score_that_is_none(capsys, place, runs, score):
    call = dict(action='predict', model=str(runs / 'detection'), images=['../p.png'])
    refuse(capsys, place, 'detection', 'score', score=score, **call)


DAMAGES = dict(
    no_json='{',
    empty='',
    list='[]',
    no_keys='{}',
    null='null',
    task=dict(task=3),
    task_list=dict(task=['detection']),
    unknown_backbone=dict(backbone='rm -rf'),
    backbone_int=dict(backbone=3),
    other_backbone=dict(backbone='pvtv2_micro'),
    classes_int=dict(classes=3),
    no_classes=dict(classes=[]),
    fewer_classes=dict(classes=['a'], category_ids=[1]),
    size_word=dict(size='x'),
    size_true=dict(size=True),
    gray=dict(in_chans=1),
    system_list=dict(system=[1]),
    system_unknown=dict(system=dict(x=1)),
    system_wide=dict(system=dict(width=-1)),
    system_word=dict(system=dict(width='x')),
    std=dict(std=[0, 0, 0]),
    mean=dict(mean=['a', 'b', 'c']),
    ids=dict(category_ids='x'),
    data=dict(data=None),
    weights=b'\0' * 99,
    no_weights=b'',
)


@both
@pytest.mark.parametrize('damage', DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_run(capsys, place, runs, task, damage):
    folder = shutil.copytree(runs / task, place.parent / 'run')
    file = folder / 'run.json'
    if isinstance(damage, bytes):
        (folder / 'model.safetensors').write_bytes(damage)
    elif isinstance(damage, str):
        file.write_text(damage)
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | damage))
    call = dict(action='predict', model=str(folder), images=['../p.png'])
    refuse(capsys, place, task, **call)
