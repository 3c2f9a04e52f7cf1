"""Every record of the authors' code against our model: logits, loss and all gradients at 1e-9.

The pages show the intermediate quantities too, of models that fit their minute; this lane holds
all records, those of base and 384-pixel models included.
"""

import pytest

from vitlit.records import check_record, load_record, records_path
from vitlit.registry import create_model
from vitlit.weights import load_official

FAMILIES = ('pit', 'swat', 'ista2')
OURS = {'ista2/swin_tiny': 'swin_t'}  # records that are not called after our model
RECORDS = sorted(
    p.relative_to(records_path()).with_suffix('').as_posix()
    for family in FAMILIES
    for p in (records_path() / family).glob('*.json')
)


@pytest.mark.parametrize('record', RECORDS)
def test_parity(record):
    reference = load_record(record)
    name = OURS.get(record, record.split('/')[1])

    def run(state, x):
        size = {} if reference['size'] == 224 else dict(img_size=reference['size'])
        model = create_model(name, **size).double().eval()
        assert load_official(model, state).source == 'official'
        rules = next(r for r in model.name_rules if r.fits(state))
        own, out = dict(model.named_parameters()), {'logits': model(x)}
        return out, {k: own[rules.rename(k)] for k in state if rules.rename(k) in own}

    others = [k for k in reference['outputs'] if k != 'logits']
    deviations = check_record(run, reference, skip=others)
    assert {'logits', 'loss', 'grad input'} <= deviations.keys() and len(deviations) > 8
