"The Python blocks of README.md run as pasted, in order, in a fresh interpreter."

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_blocks_run(tmp_path):
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    blocks = re.findall(r'^```python\n(.*?)^```', text, flags=re.M | re.S)
    assert len(blocks) >= 4
    script = tmp_path / 'readme.py'
    script.write_text('\n'.join(blocks), encoding='utf-8')
    env = os.environ | {'MPLBACKEND': 'agg'}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
