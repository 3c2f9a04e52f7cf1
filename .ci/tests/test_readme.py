"The Python blocks of README.md run as pasted: one after the other, and each alone."

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(
    r'^```python\n(.*?)^```', (ROOT / 'README.md').read_text(encoding='utf-8'), flags=re.M | re.S
)


def run(script, text):
    "Run `text` in a fresh interpreter; what it prints on stderr is the reason if it fails."
    script.write_text(text, encoding='utf-8')
    env = os.environ | {'MPLBACKEND': 'agg'}
    words = [sys.executable, '-W', 'error::FutureWarning', script]
    done = subprocess.run(words, cwd=script.parent, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


def test_there_are_blocks():
    assert len(BLOCKS) >= 5


def test_blocks_run_in_order(tmp_path):
    run(tmp_path / 'readme.py', '\n'.join(BLOCKS))


@pytest.mark.parametrize('block', BLOCKS, ids=range(len(BLOCKS)))
def test_block_runs_alone(block, tmp_path):
    run(tmp_path / 'block.py', block)
