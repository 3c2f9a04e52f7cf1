"""What other libraries do to a model: trace, export, quantize, adapt, prune, replicate, reload it.

Everything is done to the small models. peft brings transformers along, and both come with vitlit's
development requirements; tests of onnx and onnxruntime run where these are installed.
"""

import copy
import io
import sys
from functools import partial
from types import ModuleType

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils.model import reparameterize_model
from torch import nn
from torch.nn.utils import parametrizations, prune

import vitlit.models  # noqa: F401  files all names with timm
from vitlit import registry
from vitlit.registry import list_models
from vitlit.weights import load_official, save_weights

pytestmark = [
    pytest.mark.filterwarnings('ignore::DeprecationWarning'),
    pytest.mark.filterwarnings('ignore::FutureWarning'),
    pytest.mark.filterwarnings('ignore::UserWarning'),
    pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning'),
]
NAMES = list_models('*_micro')
every = pytest.mark.parametrize('name', NAMES)


def build(name, **kw):
    "A model in evaluation mode, drawn from a fixed seed, with a classifier that is not zero."
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **kw).eval()
    nn.init.normal_(model.head.fc.weight, std=0.1)
    return model


def images(n=2, name=NAMES[0]):
    size = timm.get_pretrained_cfg(name).input_size
    return torch.randn(n, *size, generator=torch.Generator().manual_seed(n))


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def inner_linear(model):
    "Name and layer of every linear map but the classifier."
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    return [(n, m) for n, m in found if not n.startswith('head')]


# -- graphs ---------------------------------------------------------------------------------------


@every
def test_plain_symbolic_trace(name):
    "torch.fx without anybody's lists; the graph takes other batches and refuses other sizes."
    model = build(name)
    graph = torch.fx.symbolic_trace(model)
    for traced in (graph, copy.deepcopy(graph)):
        for n in (2, 5):
            close(traced(images(n)), model(images(n)))
        with pytest.raises(ValueError, match='48×64 pixels'):
            traced(images()[:, :, :48])


@every
def test_torchvision_feature_extractor(name):
    from torchvision.models.feature_extraction import (
        create_feature_extractor,
        get_graph_node_names,
    )

    model = build(name)
    names = get_graph_node_names(model)[1]
    tap = [n for n in names if n.startswith('stages.0.blocks.0')][-1]
    out = create_feature_extractor(model, {names[-1]: 'logits', tap: 'tokens'})(images(5))
    close(out['logits'], model(images(5)))
    assert out['tokens'].shape[0] == 5
    with pytest.raises(ValueError, match='48×64 pixels'):
        create_feature_extractor(model, ['norm'])(images()[:, :, :48])


@every
def test_jit_trace(name):
    model = build(name)
    with torch.no_grad():
        traced = torch.jit.trace(model, images(2))
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        for graph in (traced, torch.jit.load(file)):
            close(graph(images(3)), model(images(3)))


@every
def test_jit_script_is_refused(name):
    "TorchScript cannot read these models; one sentence names what can."
    with pytest.raises(TypeError, match=r'torch\.jit\.trace'):
        torch.jit.script(build(name))


@every
def test_legacy_onnx(name, tmp_path):
    "The exporter of torch before 2.9 (dynamo=False), with any batch."
    pytest.importorskip('onnx')
    runtime = pytest.importorskip('onnxruntime')
    model, file = build(name), str(tmp_path / 'model.onnx')
    names = dict(input_names=['x'], output_names=['y'])
    axes = {'x': {0: 'batch'}, 'y': {0: 'batch'}}
    torch.onnx.export(
        model, (images(),), file, dynamo=False, dynamic_axes=axes, opset_version=17, **names
    )
    session = runtime.InferenceSession(file, providers=['CPUExecutionProvider'])
    for n in (2, 3):
        (y,) = session.run(None, {'x': images(n).numpy()})
        close(torch.from_numpy(y), model(images(n)).detach(), 1e-4)


# -- weights --------------------------------------------------------------------------------------


@every
def test_timm_recreates_buffers(name):
    "Built on meta, given memory, loaded: timm writes again what is in no state dict."
    tools = pytest.importorskip('timm.models._manipulate')
    if not hasattr(tools, 'reinit_non_persistent_buffers'):
        pytest.skip('this timm does not do so')
    model, empty = build(name), build_on_meta(name)
    for b in empty.buffers():
        b.fill_(float('nan') if b.is_floating_point() else 0)
    empty.load_state_dict(model.state_dict())
    tools.reinit_non_persistent_buffers(empty)
    close(empty(images()), model(images()))


def build_on_meta(name):
    model = timm.create_model(name, num_classes=5, device='meta')
    return model.to_empty(device='cpu').eval()


@every
def test_replicas(name):
    "DataParallel's replicas: shallow copies whose parameters are plain tensors."
    model = build(name)
    modules = list(model.modules())
    place = {m: i for i, m in enumerate(modules)}
    replicas = [m._replicate_for_data_parallel() for m in modules]
    for m, replica in zip(modules, replicas):
        replica._former_parameters = {}
        for key, child in m._modules.items():
            replica._modules[key] = None if child is None else replicas[place[child]]
        for key, p in m._parameters.items():
            if p is None:
                replica._parameters[key] = None
            else:
                setattr(replica, key, 1.1 * p.detach())
                replica._former_parameters[key] = getattr(replica, key)
        for key, b in m._buffers.items():
            if b is not None:
                replica._buffers[key] = b.clone()
    other = copy.deepcopy(model)
    with torch.no_grad():
        before = model(images())
        for p in other.parameters():
            p.mul_(1.1)
        close(replicas[0].eval()(images()), other(images()))
        close(model(images()), before)


@every
def test_gradients_of_each_image(name):
    from torch.func import functional_call, grad, vmap

    model, labels = build(name), torch.tensor([0, 1])
    weights = {k: p.detach() for k, p in model.named_parameters()}

    def loss(weights, image, label):
        return F.cross_entropy(functional_call(model, weights, (image[None],)), label[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))(weights, images(), labels)
    for i in range(2):
        model.zero_grad()
        F.cross_entropy(model(images()[i : i + 1]), labels[i : i + 1]).backward()
        for key, p in model.named_parameters():
            close(each[key][i], p.grad)


class Scaled(nn.Module):
    "A score of its own for each head, as a part of attention that somebody wrote."

    def __init__(self, heads):
        super().__init__()
        self.factor = nn.Parameter(1 + torch.rand(heads, 1, 1))

    def forward(self, scores, grid, keys):
        return scores * self.factor


COMPOSED = {
    'pit, mixer': lambda: compose('pit_micro', mixer='structured_attention'),
    'pit, channel and transition': lambda: compose(
        'pit_micro', channel='structured_mlp', transition='average'
    ),
    'pit, score': lambda: compose('pit_micro', score=Scaled),
    'deit, score and stem': lambda: compose('deit_micro', score=Scaled, stem='structured'),
    'swin, all': lambda: compose(
        'swin_micro',
        mixer='structured_attention',
        channel='structured_mlp',
        transition='structured_merging',
        stem='structured',
    ),
    'swat without its mixer': lambda: build('swat_vit_micro', within='linear'),
}
MAKERS = COMPOSED | {name: partial(build, name) for name in NAMES}


def compose(host, **slots):
    torch.manual_seed(0)
    return registry.build(host, num_classes=5, **slots).eval()


def drawn(make, seed):
    "A model of `make` with all parameters drawn from `seed`."
    model = make()
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    return model


@pytest.mark.parametrize('fused', [False, True], ids=['as built', 'fused'])
@pytest.mark.parametrize('make', MAKERS.values(), ids=MAKERS)
def test_saved_and_reloaded(make, fused, tmp_path):
    """A model that was composed, or fused for deployment by timm's `reparameterize_model`, answers
    as before, and so does another one into which its state dict was loaded."""
    model, x = drawn(make, 0), images()
    with torch.no_grad():
        want = model(x)
        if fused:
            model = reparameterize_model(model)
            close(model(x), want)
        torch.save(model.state_dict(), tmp_path / 'model.pth')
        save_weights(model, tmp_path / 'model.safetensors')
        for file in ('model.pth', 'model.safetensors'):
            other = drawn(make, 1)
            other = reparameterize_model(other) if fused else other
            assert not torch.allclose(other(x), want, atol=1e-4)
            if file == 'model.pth':
                other.load_state_dict(torch.load(tmp_path / file))
            else:
                load_official(other, tmp_path / file)
            assert torch.equal(other(x), model(x))


# -- adapters, pruning, quantization --------------------------------------------------------------


class LoRA(nn.Module):
    "What an adapter library puts in place of a linear map: the map and a low-rank term."

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(torch.randn(4, base.in_features) * 0.1)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, 4))

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + x @ self.lora_A.T @ self.lora_B.T

    def merged(self):
        layer = copy.deepcopy(self.base)
        layer.weight.data += self.lora_B.detach() @ self.lora_A.detach()
        return layer


def put(model, name, layer):
    parent, _, key = name.rpartition('.')
    setattr(model.get_submodule(parent), key, layer)


@every
def test_lora(name):
    "Adapters on every linear map: each learns, and merged into the weights they give the same."
    model = build(name).requires_grad_(False)
    for p in model.parameters():
        if not p.any():  # what begins as zero would keep gradients from the maps before it
            nn.init.normal_(p, std=0.02)
    before = model(images())
    for key, layer in inner_linear(model):
        put(model, key, LoRA(layer))
    close(model(images()), before)
    F.cross_entropy(model(images()), torch.tensor([0, 1])).backward()
    grads = {k: p.grad for k, p in model.named_parameters() if k.endswith('lora_B')}
    idle = [k for k, g in grads.items() if g is None or not g.any()]
    idle = [k for k in idle if '.transition.fc.' not in k]  # of prefix tokens, which may be none
    assert grads and not idle
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.05)
    adapted = model(images())
    assert not torch.allclose(adapted, before, atol=1e-4)
    for key, layer in list(model.named_modules()):
        if isinstance(layer, LoRA):
            put(model, key, layer.merged())
    close(model(images()), adapted, 1e-4)


@every
def test_peft(name):
    peft = pytest.importorskip('peft')
    config = peft.LoraConfig(r=4, target_modules='all-linear', modules_to_save=['head.fc'])
    model = peft.get_peft_model(build(name), config)
    model(images()).square().sum().backward()
    grads = {k: p.grad for k, p in model.named_parameters() if 'lora_B' in k}
    assert grads and not [k for k, g in grads.items() if g is None]
    adapted = model.eval()(images())
    close(model.merge_and_unload().eval()(images()), adapted, 1e-4)


@every
def test_pruning_and_weight_norm(name):
    "Masks and reparametrized weights count, and what lies behind them learns over several steps."
    for change in (masked, normed):
        model = build(name).train()
        before = model(images())
        for _, layer in inner_linear(model):
            change(layer)
        moved = not torch.allclose(model(images()), before, atol=1e-4)
        assert moved == (change is masked)
        step = torch.optim.SGD(model.parameters(), 0.01)
        for _ in range(2):
            step.zero_grad()
            F.cross_entropy(model(images()), torch.tensor([0, 1])).backward()
            step.step()
        assert not [k for k, p in model.named_parameters() if p.grad is None]
        for key, layer in inner_linear(model):
            if change is masked:
                assert not layer.weight[layer.weight_mask == 0].any(), key


def masked(layer):
    prune.l1_unstructured(layer, 'weight', amount=0.5)


def normed(layer):
    parametrizations.weight_norm(layer)


@every
def test_dynamic_quantization(name):
    quantization = pytest.importorskip('torch.ao.quantization')
    if not hasattr(quantization, 'quantize_dynamic') or not torch.backends.quantized.engine:
        pytest.skip('this torch has none')
    model = build(name)
    small = quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    left = [n for n, m in small.named_modules() if type(m) is nn.Linear]
    assert not left
    off = (small(images()) - model(images())).norm() / model(images()).norm()
    assert 0 < off < 0.2


# -- fastai and transformers ----------------------------------------------------------------------


@pytest.fixture(scope='session')
def loaders(tmp_path_factory):
    "Two classes of generated files, through fastai's own loader and transforms."
    from fastai.vision.all import ImageDataLoaders, Resize
    from PIL import Image

    folder = tmp_path_factory.mktemp('images')
    for split, n in (('train', 8), ('valid', 4)):
        for k, label in enumerate(('dark', 'bright')):
            (folder / split / label).mkdir(parents=True)
            for i in range(n):
                noise = Image.effect_noise((72, 70), 20 + i).point(lambda v: v // 2 + 100 * k)
                noise.convert('RGB').save(folder / split / label / f'{i}.png')
    return ImageDataLoaders.from_folder(
        folder, valid='valid', item_tfms=Resize(64), bs=4, num_workers=0
    )


@every
def test_fastai_exports_and_looks(name, loaders, tmp_path):
    "vision_learner: summary, ActivationStats, and export to a file that predicts the same."
    from fastai.callback.hook import ActivationStats
    from fastai.vision.all import load_learner, vision_learner

    stats = ActivationStats(with_hist=True)
    learn = vision_learner(loaders, name, pretrained=False, cbs=[stats])
    learn.path = tmp_path
    with learn.no_bar(), learn.no_logging():
        summary = learn.summary()
        learn.fit(1, 1e-3)
        assert 'Total params' in str(summary) and len(stats.stats) == 4
        learn.remove_cb(stats)
        learn.export('model.pkl')
        again = load_learner(tmp_path / 'model.pkl')
        file = loaders.valid_ds.items[0]
        with again.no_bar():
            close(again.predict(file)[2], learn.predict(file)[2])


def test_checkpoint_of_a_training_script_is_downloaded(tmp_path, monkeypatch):
    """With the configuration that Swin's code pickles beside the weights, an object of yacs."""
    yacs = ModuleType('yacs.config')
    yacs.CfgNode = type('CfgNode', (dict,), dict(__module__='yacs.config'))
    model, file = build('dwnet_micro'), tmp_path / 'dwnet.pth'
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'yacs', ModuleType('yacs'))
        patch.setitem(sys.modules, 'yacs.config', yacs)
        torch.save(dict(model=model.state_dict(), config=yacs.CfgNode(A=yacs.CfgNode(B=1))), file)
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    cfg = dict(url=file.as_uri(), num_classes=5)
    again = timm.create_model('dwnet_micro', pretrained=True, pretrained_cfg=cfg).eval()
    close(again(images()), model(images()), 0)


@every
def test_timms_hub_format(name, tmp_path):
    "A folder as timm saves it for a hub makes the same model again, classes included."
    model = build(name)
    timm.models.save_for_hf(model, tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert again.num_classes == 5 and again.trained
    close(again(images()), model(images()))


@every
def test_transformers_wrapper(name, tmp_path):
    "transformers' wrapper of timm's models saves one and loads it again, by way of meta."
    transformers = pytest.importorskip('transformers')
    config = transformers.TimmWrapperConfig(architecture=name, num_labels=4)
    model = transformers.TimmWrapperForImageClassification(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)
    model.save_pretrained(tmp_path)
    again = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path).eval()
    close(again(pixel_values=images()).logits, model(pixel_values=images()).logits)
