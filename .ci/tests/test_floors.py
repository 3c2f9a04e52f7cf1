"""Exported code imports downwards only, and light modules stay light.

The floors, lowest first. A module may import from lower floors and, within its own floor, from
siblings as long as nothing goes round in a circle.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vitlit

ROOT = Path(vitlit.__file__).parent
FLOORS = (
    ('check', 'core', 'show', 'records'),
    ('mixing',),
    ('layers',),
    ('attention',),
    ('backbone',),
    ('registry', 'weights', 'cost'),
    ('explain', 'papers'),
    ('models',),
    ('conformance', 'train', 'downstream'),
    ('cli',),
)
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
EXPLAIN_MAY = ('core', 'show', 'mixing', 'explain')
MODULES = sorted(p for p in ROOT.rglob('*.py') if p.name != '_modidx.py')


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix('').parts
    return parts[:-1] if parts[-1] == '__init__' else parts


def imports(path):
    "The parts below vitlit of every import in a file, inside functions too."
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
                target = (*base, *(node.module or '').split('.'))
            elif (node.module or '').split('.')[0] == 'vitlit':
                target = node.module.split('.')[1:]
            else:
                continue
            target = tuple(t for t in target if t)
            if target:
                yield target
            else:
                yield from ((a.name,) for a in node.names)
        elif isinstance(node, ast.Import):
            names = (a.name.split('.') for a in node.names)
            yield from (tuple(n[1:]) for n in names if n[0] == 'vitlit' and len(n) > 1)


@pytest.mark.parametrize('path', MODULES, ids=['.'.join(module_of(p)) or 'vitlit' for p in MODULES])
def test_imports_go_down(path):
    name = module_of(path)
    if not name:
        return
    own = name[0]
    assert own in LEVEL, f'{own} stands on no floor'
    for target in imports(path):
        other = target[0]
        if other in ('_modidx', '__version__'):
            continue
        assert other in LEVEL, f'{".".join(name)} imports {".".join(target)}, which has no floor'
        assert LEVEL[other] <= LEVEL[own], f'{".".join(name)} imports {".".join(target)} above it'
        if own == 'explain':
            assert other in EXPLAIN_MAY, f'explain imports {".".join(target)}'
        if own == 'papers':
            assert other != 'explain', 'papers know nothing of explaining'


def test_no_circles():
    "Modules of one floor do not import each other in a circle, inside functions either."
    graph = {}
    for path in MODULES:
        known = {module_of(p) for p in MODULES}
        graph[module_of(path)] = {t for t in map(tuple, imports(path)) if t in known}
    done, stack = set(), []

    def visit(node):
        assert node not in stack, ' -> '.join('.'.join(n) for n in [*stack, node])
        if node in done:
            return
        stack.append(node)
        for other in graph.get(node, ()):
            if other != node:
                visit(other)
        done.add(stack.pop())

    for node in graph:
        visit(node)


@pytest.mark.parametrize(
    'module, heavy',
    [
        ('vitlit.models', 'fastai captum sklearn IPython matplotlib.pyplot'),
        ('vitlit.train', 'fastai sklearn matplotlib'),
        ('vitlit.train.scenes', 'fastai sklearn matplotlib PIL'),
        ('vitlit.explain', 'fastai captum matplotlib'),
        ('vitlit.cli', 'torch fastai matplotlib'),
    ],
)
def test_light_imports(module, heavy):
    code = f'import sys, {module}; print(*[m for m in {heavy.split()!r} if m in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert not done.stdout.split(), f'import {module} loads {done.stdout.split()}'
