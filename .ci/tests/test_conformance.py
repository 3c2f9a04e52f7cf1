"""The conformance suite for every name: the whole of it, and what is expensive for the small ones.

This is the parity lane's: the pages run it for a few models only.
"""

import pytest

from vitlit.conformance import check_model
from vitlit.registry import list_models


@pytest.mark.parametrize('name', list_models())
def test_conformance(name):
    table = check_model(name, expensive=name.endswith('micro'))
    assert set(table['result']) <= {'passed', 'not applicable'}
    assert table['result'].count('passed') > 25
