"Opening, running and saving a page in JupyterLab changes nothing in git."

import asyncio
import json
import os
import runpy
import shutil
from pathlib import Path

import pytest
from traitlets.config import Config

ROOT = Path(__file__).parents[2]
PAGES = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / 'nbs').glob('**/[!_.]*.ipynb'))
PAGES = [p for p in PAGES if '/.' not in p]  # checkpoints


@pytest.fixture(scope='module')
def manager(tmp_path_factory):
    "The manager of files that .ci/jupyter.py gives to JupyterLab, on a copy of the pages."
    folder = tmp_path_factory.mktemp('pages')
    shutil.copytree(ROOT / 'nbs', folder / 'nbs', ignore=shutil.ignore_patterns('.ipynb*'))
    shutil.copy(ROOT / 'settings.ini', folder)
    found = Config()
    runpy.run_path(str(ROOT / '.ci' / 'jupyter.py'), dict(get_config=lambda: found))
    before = os.getcwd()
    os.chdir(folder)
    yield found.ServerApp.contents_manager_class(root_dir=str(folder))
    os.chdir(before)


def written(manager, page):
    return (Path(manager.root_dir) / page).read_bytes()


def opened(manager, page):
    return asyncio.run(manager.get(page))


def save(manager, page, content):
    asyncio.run(manager.save(dict(type='notebook', format='json', content=content), page))


@pytest.mark.parametrize('page', PAGES)
def test_nothing_changes(manager, page):
    before, content = written(manager, page), opened(manager, page)['content']
    meta = content['metadata']
    assert meta['language_info']['version'] and meta['kernelspec']['display_name'] != 'python3'
    for n, cell in enumerate(content['cells']):
        if cell['cell_type'] == 'code':
            cell['execution_count'] = n
            cell['metadata']['execution'] = {'iopub.status.busy': '2026-01-01'}
            for out in cell['outputs']:
                if out['output_type'] == 'execute_result':
                    out['execution_count'] = n
    meta['widgets'] = {'application/vnd.jupyter.widget-state+json': {}}
    save(manager, page, content)
    assert written(manager, page) == before


def test_widgets_and_removed_bars_leave_nothing(manager):
    page = PAGES[0]
    before, content = written(manager, page), opened(manager, page)['content']
    cell = next(c for c in content['cells'] if c['cell_type'] == 'code' and c['source'])
    view = {'application/vnd.jupyter.widget-view+json': {'model_id': 'a'}, 'text/plain': 'a slider'}
    bar = {'text/html': '', 'text/plain': '<IPython.core.display.HTML object>'}
    for data in (view, bar):
        cell['outputs'].append(dict(output_type='display_data', metadata={}, data=data))
    save(manager, page, content)
    assert written(manager, page) == before


def test_what_was_written_is_kept(manager):
    page = PAGES[0]
    content = opened(manager, page)['content']
    content['cells'][1]['source'] += 'more words'
    save(manager, page, content)
    kept = json.loads(written(manager, page))['cells'][1]['source']
    assert ''.join(kept).endswith('more words')
