"""Python imports this module at its start when `.ci/run` measures what the notebooks' tests run.

Cells have no file, and coverage.py measures files. So nbdev_test, and nothing else, writes each
cell to the folder named by VITLIT_MEASURE and compiles it under that name.
"""

import hashlib
import os
import sys
from pathlib import Path


def measure(folder):
    import coverage
    from IPython.core import compilerop

    cells = folder / 'cells'
    cells.mkdir(parents=True, exist_ok=True)

    def get_code_name(self, raw_code, transformed_code, number):
        path = cells / (hashlib.sha256(raw_code.strip().encode()).hexdigest()[:16] + '.py')
        path.write_text(raw_code, encoding='utf-8')
        return str(path)

    compilerop.CachingCompiler.get_code_name = get_code_name
    coverage.process_startup()


if 'VITLIT_MEASURE' in os.environ and any(a.endswith('nbdev_test') for a in sys.orig_argv):
    measure(Path(os.environ['VITLIT_MEASURE']))
