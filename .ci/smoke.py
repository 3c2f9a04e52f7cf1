"What users of the package rely on: it imports without the toolchain, predicts and trains."

import importlib
import pkgutil
import sys

import torch

import vitlit
import vitlit.models

heavy = [m for m in ('fastai', 'captum', 'nbdev', 'IPython') if m in sys.modules]
assert not heavy, f'import vitlit.models loads {heavy}'
assert '/site-packages/' in vitlit.__file__.replace('\\', '/'), (
    f'this tests the installed package, not {vitlit.__file__}'
)

x = torch.randn(2, 3, 32, 32)
model = vitlit.models.pit_micro(img_size=32, num_classes=10).eval()
with torch.no_grad():
    y = model(x)
assert y.shape == (2, 10) and y.isfinite().all(), y

import timm  # noqa: E402

assert timm.create_model('pit_micro', num_classes=7).get_classifier().out_features == 7

import fastcore  # noqa: E402
import fastai  # noqa: E402
import fastai.callback.progress  # noqa: E402, F401  gives learners no_bar
import fastai.callback.schedule  # noqa: E402, F401  and fit_one_cycle
from fastai.data.core import DataLoaders  # noqa: E402
from fastai.learner import Learner  # noqa: E402
from fastai.losses import CrossEntropyLossFlat  # noqa: E402

torch.manual_seed(0)
images = [
    (torch.randn(3, 32, 32) + 2 * (i % 2), torch.tensor(i % 2)) for i in range(64)
]  # two classes: dark and bright
dls = DataLoaders.from_dsets(images[:48], images[48:], bs=16, device='cpu')
learn = Learner(
    dls, vitlit.models.pit_micro(img_size=32, num_classes=2), loss_func=CrossEntropyLossFlat()
)
before = float(learn.validate()[0])
with learn.no_bar(), learn.no_logging():
    learn.fit_one_cycle(2, 1e-3)
after = float(learn.validate()[0])
assert after < before, f'two epochs of fastai did not lower the loss: {before:.3f} to {after:.3f}'

names = [m.name for m in pkgutil.walk_packages(vitlit.__path__, 'vitlit.')]
for name in names:
    importlib.import_module(name)
toolchain = [m for m in ('nbdev', 'execnb', 'pytest', 'jupyterlab') if m in sys.modules]
assert not toolchain, f'the package imports its toolchain: {toolchain}'
print(
    f'{len(names)} modules; fastai {fastai.__version__}, fastcore {fastcore.__version__}, '
    f'torch {torch.__version__}; loss {before:.3f} to {after:.3f}'
)
