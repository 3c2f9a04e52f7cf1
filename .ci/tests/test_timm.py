"""timm's own model tests, of the installed version, on vitlit's names.

The functions come from timm's source distribution, which pip downloads once into the folder that
TIMM_TESTS names (a temporary one without it). Some models get all of them; the configuration of
every name and of every weight tag is checked on the meta device.
"""

import importlib.util
import inspect
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
import timm
import torch
from timm.models._pretrained import PretrainedCfg

from vitlit.registry import create_model, list_models, model_info

FULL = ('pit_micro', 'deit_micro', 'pit_ti_distilled', 'swat_swin_micro', 'ista2_swin_micro')
FULL += ('lvvit_micro', 'spvit_micro')
FUNCTIONS = (
    ('test_model_forward', 1),
    ('test_model_backward', 2),
    ('test_model_forward_intermediates', 1),
    ('test_model_forward_intermediates_features', 1),
    ('test_model_forward_fx', 1),
    ('test_model_backward_fx', 2),
    ('test_prune_intermediate_layers_contract', None),
    ('test_model_forward_features', 1),  # of models with pool_size only
)
NAMES = list_models()
TAGGED = list_models(pretrained=True)


@pytest.fixture(scope='session')
def theirs():
    "timm's tests/test_models.py as a module."
    cache = Path(os.environ.get('TIMM_TESTS') or tempfile.mkdtemp(prefix='timm-tests-'))
    folder = cache / f'timm-{timm.__version__}'
    if not (folder / 'tests' / 'test_models.py').is_file():
        cache.mkdir(parents=True, exist_ok=True)
        what = ['--no-deps', '--no-binary', 'timm', '--dest', str(cache)]
        pip = [sys.executable, '-m', 'pip', 'download', '--quiet', *what]
        subprocess.run([*pip, f'timm=={timm.__version__}'], check=True)
        # early releases of Python 3.10 and 3.11 have no filters
        safely = dict(filter='data') if hasattr(tarfile, 'data_filter') else {}
        with tarfile.open(next(cache.glob(f'timm-{timm.__version__}.tar.gz'))) as tar:
            for member in tar.getmembers():
                if '/tests/' in member.name and member.isfile() and '..' not in member.name:
                    tar.extract(member, cache, **safely)
    path = folder / 'tests' / 'test_models.py'
    spec = importlib.util.spec_from_file_location('timm_test_models', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    survives = module._assert_frozen_survives_reset_and_resize

    def unless_fixed(name, *args, **kw):
        "Models with token MLPs cannot be resized; these have to refuse."
        if not model_info(name).fixed_tokens:
            return survives(name, *args, **kw)
        with pytest.raises(ValueError, match='places'):
            survives(name, *args, **kw)

    module._assert_frozen_survives_reset_and_resize = unless_fixed
    return module


@pytest.mark.parametrize('function, batch', FUNCTIONS, ids=[f for f, _ in FUNCTIONS])
@pytest.mark.parametrize('name', FULL)
def test_timm(theirs, name, function, batch):
    if function == 'test_model_forward_features' and not model_info(name).pool_size:
        pytest.skip('its features are tokens')
    getattr(theirs, function)(*((name,) if batch is None else (name, batch)))


@pytest.mark.parametrize('name', NAMES)
def test_default_cfg(theirs, name):
    spatial = bool(timm.get_pretrained_cfg(name).pool_size)
    test = theirs.test_model_default_cfgs if spatial else theirs.test_model_default_cfgs_non_std
    extra = ('meta',) if len(inspect.signature(test).parameters) == 3 else ()
    test(name, 1, *extra)


@pytest.mark.parametrize('name', TAGGED)
def test_tagged_cfg(name):
    "What the configuration of a tag says holds of the model built for it."
    base, _, tag = name.partition('.')
    cfg = model_info(base).pretrained_cfg(tag)
    assert isinstance(cfg, PretrainedCfg) and cfg.license and cfg.tag == tag
    size = cfg.input_size
    model = create_model(name, device='meta', num_classes=cfg.num_classes, img_size=size[1:]).eval()
    assert tuple(model.img_size) == tuple(size[1:])
    assert model.pretrained_cfg['input_size'] == size
    features = model.forward_features(torch.empty(1, *size, device='meta'))
    if cfg.pool_size:
        assert features.shape[-2:] == cfg.pool_size
    assert model.forward_head(features).shape == (1, cfg.num_classes)
    state = model.state_dict()
    classifier = cfg.classifier if isinstance(cfg.classifier, tuple) else (cfg.classifier,)
    assert all(f'{layer}.weight' in state for layer in (cfg.first_conv, *classifier))


@pytest.mark.parametrize('name', [n for n in TAGGED if n.endswith(('.scenes', '.digits'))])
def test_timm_loads_shipped_weights(name):
    "timm.create_model takes the weights of our tags from the files of the package."
    cfg = model_info(name.split('.')[0]).pretrained_cfg(name.split('.')[1])
    theirs = timm.create_model(name, pretrained=True, img_size=cfg.input_size[1:]).eval()
    ours = create_model(name, pretrained=True).eval()
    x = torch.randn(2, *cfg.input_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), ours(x))
