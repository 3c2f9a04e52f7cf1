"""The conformance suite for every name: the whole of it, and what is expensive for the small ones.

This is the parity lane's: the pages run it for a few models only.
"""

from functools import partial

import pytest

from vitlit.conformance import check_model
from vitlit.registry import create_model, list_models

# With weights that are made from names, these overflow in evaluation or lose the digits of float32,
# as the authors' code does: a dynamic convolution is quadratic in its input. Numbers are those of a
# copy with fewer blocks.
DEEP = ('dynamic_dwnet_base', 'i_dynamic_dwnet_base', 'i_dynamic_dwnet_tiny')


@pytest.mark.parametrize('name', list_models())
def test_conformance(name):
    model = partial(create_model, name, depths=(1, 1, 2, 1)) if name in DEEP else name
    results = list(check_model(name, only='meta')['result'])
    results += check_model(model, only='numbers')['result']
    if name.endswith('micro'):
        results += check_model(name, only='expensive')['result']
    assert set(results) <= {'passed', 'not applicable'}
    assert results.count('passed') > 25
