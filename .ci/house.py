#!/usr/bin/env python3
"""The rules of the house, as a program.

    python .ci/house.py readme [--check]      README.md out of nbs/index.ipynb, or: is it current?
    python .ci/house.py lint [NOTEBOOK ...]   measures and manners of the notebooks
    python .ci/house.py t2 [NAME ...]         timm's own model tests, of the installed version, on vitlit's names
"""
import argparse
import ast
import base64
import json
import os
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'


# Notebooks, as far as the rules need them

def source(cell): return ''.join(cell['source'])

def directives(cell):
    "The words after `#|` at the top of a code cell, one list a line."
    lines = source(cell).splitlines() if cell['cell_type'] == 'code' else []
    return [line.lstrip()[2:].split() for line in lines if re.match(r'\s*#\s?\|', line)]

def has(cell, *words): return any(d and d[0].rstrip(':') in words for d in directives(cell))

def code(cell):
    "The source of a code cell without directives, and with magics blanked."
    lines = [line for line in source(cell).splitlines() if not re.match(r'\s*#\s?\|', line)]
    return '\n'.join('pass' if re.match(r'[%!]', line) else line for line in lines)

def notebooks():
    "All notebooks that nbdev sees."
    hidden = lambda p: any(part.startswith(('_', '.')) for part in p.relative_to(NBS).parts)
    return sorted(p for p in NBS.rglob('*.ipynb') if not hidden(p))

def read(path): return json.loads(Path(path).read_text(encoding='utf-8'))


# README

class _Table(HTMLParser):
    "Collect the cells of the tables in a piece of HTML."
    def __init__(self):
        super().__init__()
        self.rows, self.cell = [], None
    def handle_starttag(self, tag, attrs):
        if tag == 'tr': self.rows.append([])
        if tag in ('td', 'th'): self.cell = ''
    def handle_endtag(self, tag):
        if tag in ('td', 'th') and self.cell is not None:
            self.rows[-1].append(' '.join(self.cell.split()).replace('|', '\\|'))
            self.cell = None
    def handle_data(self, data):
        if self.cell is not None: self.cell += data

def html_table(html):
    "A table in HTML as one in markdown."
    parser = _Table()
    parser.feed(html)
    rows = [r for r in parser.rows if r]
    width = max(len(r) for r in rows)
    rows = [[''] * (width - len(r)) + r for r in rows]                       # a short row misses index cells
    return '\n'.join('| ' + ' | '.join(r) + ' |' for r in [rows[0], ['---'] * width, *rows[1:]])

def top_level(text, base='nbs'):
    "Make relative links of a page in `base` work from the top of the repository."
    def fix(m):
        link = m[2]
        if re.match(r'[a-z]+:|[#/]', link): return m[0]
        return f"{m[1]}{os.path.normpath(f'{base}/{link}').replace(os.sep, '/')}{m[3]}"
    parts = re.split(r'(^```.*?^```)', text, flags=re.M | re.S)
    return ''.join(p if p.startswith('```') else re.sub(r'(\]\(|src=")([^)"\s]+)([)"])', fix, p) for p in parts)

def outputs_md(cell, images):
    "The outputs of a code cell as markdown; pictures are added to `images` ({path: bytes})."
    alt = next((' '.join(d[1:]).strip('"\'') for d in directives(cell) if d and d[0] == 'fig-alt:'), 'figure')
    for n, out in enumerate(cell.get('outputs', [])):
        if out['output_type'] == 'stream':
            if out['name'] == 'stdout': yield '```text\n' + ''.join(out['text']).rstrip() + '\n```'
            continue
        data = {k: ''.join(v) if isinstance(v, list) else v for k, v in out.get('data', {}).items()}
        if 'image/png' in data:
            path = f"nbs/images/readme_{cell['id']}{f'_{n}' if n else ''}.png"
            images[path] = base64.b64decode(data['image/png'])
            yield f'![{alt}]({path})'
        elif 'text/markdown' in data: yield top_level(data['text/markdown']).rstrip()
        elif '<table' in data.get('text/html', ''): yield html_table(data['text/html'])
        elif 'text/plain' in data: yield '```text\n' + data['text/plain'].rstrip() + '\n```'

def readme(nb):
    "(text, {path: bytes}) of the README that belongs to the notebook `nb`."
    parts, images = [], {}
    for cell in nb['cells']:
        if cell['cell_type'] == 'markdown': parts.append(top_level(source(cell)).rstrip())
        if cell['cell_type'] != 'code' or has(cell, 'hide', 'default_exp') or ['include:', 'false'] in directives(cell): continue
        text = '\n'.join(line for line in source(cell).splitlines() if not re.match(r'\s*#\s?\|', line)).strip()
        if text and ['echo:', 'false'] not in directives(cell): parts.append(f'```python\n{text}\n```')
        if ['output:', 'false'] not in directives(cell): parts += outputs_md(cell, images)
    head = '<!-- made from nbs/index.ipynb by `python .ci/house.py readme`; edit the notebook -->\n\n'
    return head + '\n\n'.join(p for p in parts if p) + '\n', images

def cmd_readme(args):
    text, images = readme(read(NBS/'index.ipynb'))
    files = {'README.md': text.encode(), **images}
    stale = [f for f, data in files.items() if not (ROOT/f).is_file() or (ROOT/f).read_bytes() != data]
    left = [str(p.relative_to(ROOT)) for p in NBS.glob('images/readme_*.png') if str(p.relative_to(ROOT)) not in files]
    if args.check:
        for f in stale: print(f"{f} is not what nbs/index.ipynb gives; run: python .ci/house.py readme")
        for f in left: print(f"{f} belongs to no output of nbs/index.ipynb")
        return bool(stale or left)
    for f in left: (ROOT/f).unlink()
    for f in stale:
        (ROOT/f).parent.mkdir(parents=True, exist_ok=True)
        (ROOT/f).write_bytes(files[f])
    print('README.md is current' + (f" (written: {', '.join(stale)})" if stale else ''))
    return 0


# Lint

MAX_CELLS, MAX_EXPORT, MAX_BYTES, MAX_FIGURES, MAX_DPI, MAX_LINE = 90, 60, 400_000, 8, 100, 160
EXPORT = ('export', 'exports', 'exporti')
UNWANTED = {
    'a machine path': r'(?<![\w.~:/])/(?:home|root|tmp|usr|opt|work|Users|mnt|private|var)/[\w.-]|[A-Z]:\\\\?\w+\\',
    'a warning': r'\bWarning\b|\bWARNING\b|\bDeprecat',
    'a time': r'\b\d\d:\d\d(?::\d\d)?\b|Wall time|CPU times|\d\s?(?:s|ms|µs|us|ns)\s?±|\b\d+(?:\.\d+)? (?:seconds|minutes) (?:ago|elapsed)',
    'a progress bar': r'█|it/s\]|\bs/it\b|<progress|\d%\|',
    'a memory address': r'\bat 0x[0-9a-f]{6,}',
    'a version': r'\b(?:torch|torchvision|timm|fastai|captum|numpy|python|matplotlib)[ =]{1,3}v?\d+\.\d+\.\d+',
}

def imports_mixed(tree):
    "Does a cell import at top level and do something else as well?"
    is_import = lambda n: isinstance(n, (ast.Import, ast.ImportFrom))
    quiet = lambda n: (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)
                       or isinstance(n, ast.Assign) and all(isinstance(t, ast.Name) and t.id == '_all_' for t in n.targets))
    return any(map(is_import, tree.body)) and not all(is_import(n) or quiet(n) for n in tree.body)

def public_names(tree):
    "The names that an exported cell makes public, as nbdev lists them in `__all__`."
    for n in tree.body:
        if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            if not any(getattr(getattr(d, 'func', d), 'id', '') in ('patch', 'patch_to') for d in n.decorator_list): yield n.name
        elif isinstance(n, ast.Assign):
            yield from (e.id for t in n.targets for e in ast.walk(t) if isinstance(e, ast.Name))
        elif isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name): yield n.target.id

def checks(tree):
    "Does a cell assert something?"
    called = lambda n: getattr(n.func, 'id', getattr(n.func, 'attr', ''))
    return any(isinstance(n, ast.Assert) or isinstance(n, ast.Call) and re.match(r'(check|test)_', called(n)) for n in ast.walk(tree))

def mentioned(tree):
    "The names, attributes and words in texts that a cell uses."
    for n in ast.walk(tree):
        if isinstance(n, ast.Name): yield n.id
        elif isinstance(n, ast.Attribute): yield n.attr
        elif isinstance(n, ast.alias): yield n.name
        elif isinstance(n, ast.Constant) and isinstance(n.value, str): yield from re.findall(r'\w+', n.value)

def png_info(data):
    "(width, height, dots per inch or None) of a PNG file."
    w, h = struct.unpack('>II', data[16:24])
    at = data.find(b'pHYs')
    return w, h, struct.unpack('>I', data[at + 4:at + 8])[0] * 0.0254 if at > 0 else None

def prose(cell):
    "Markdown without fenced code, code spans and formulas."
    text = re.sub(r'^```.*?^```', '', source(cell), flags=re.M | re.S)
    return re.sub(r'`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$', '', text, flags=re.S)

def lint_code(cells, where):
    "Imports, lengths and checks of the code cells."
    exported, used = [], set()
    for i, c in cells:
        try: tree = ast.parse(code(c))
        except SyntaxError as e: yield f'cell {i} is not Python: {e.msg}'; continue
        if imports_mixed(tree): yield f'cell {i} mixes imports with other code'
        stars = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and any(a.name == '*' for a in n.names)]
        if stars and not where.startswith('tutorials'): yield f'cell {i} has a star import'
        if ['eval:', 'false'] in directives(c): yield f'cell {i} is never run (eval: false); use a flag such as slow'
        if 'nbdev_export()' in code(c): yield f'cell {i} calls nbdev_export, which would rewrite the package during the tests'
        wide = [n for n, line in enumerate(source(c).splitlines(), 1) if len(line) > MAX_LINE]
        if wide: yield f'cell {i} has lines of more than {MAX_LINE} characters: {wide}'
        if has(c, *EXPORT):
            n = len(code(c).strip().splitlines())
            if n > MAX_EXPORT: yield f'cell {i} exports {n} lines, more than {MAX_EXPORT}'
            if not has(c, 'exporti'): exported += [name for name in public_names(tree) if not name.startswith('_')]
        elif checks(tree): used |= set(mentioned(tree))
    missing = [n for n in dict.fromkeys(exported) if n not in used]
    if missing: yield f"exported, but in no checking cell: {', '.join(missing)}"

def lint_outputs(cells):
    "What a reader sees below the cells."
    figures = 0
    for i, c in cells:
        for out in c.get('outputs', []):
            if out['output_type'] == 'error': yield f"cell {i} has a saved error ({out.get('ename')})"
            if out.get('name') == 'stderr': yield f'cell {i} has output on stderr'
            data = {k: ''.join(v) if isinstance(v, list) else str(v) for k, v in {'stream': out.get('text', ''), **out.get('data', {})}.items()}
            for kind, text in data.items():
                if kind.startswith('image/') and kind != 'image/svg+xml': continue
                for what, pattern in UNWANTED.items():
                    m = re.search(pattern, text)
                    if m: yield f'cell {i} has {what} in its output: …{text[max(0, m.start() - 20):m.end() + 20]!r}…'
            if 'image/png' in data:
                figures += 1
                dpi = png_info(base64.b64decode(data['image/png']))[2]
                if dpi and dpi > MAX_DPI + 1: yield f'cell {i} has a figure of {dpi:.0f} dpi, more than {MAX_DPI}'
    if figures > MAX_FIGURES: yield f'{figures} figures, more than {MAX_FIGURES}'
    if cells and not any(c.get('outputs') for _, c in cells): yield 'no saved outputs: a reader sees no result'

def lint_prose(cells, path):
    "Title, headings and links."
    first = next((source(c) for _, c in cells), '')
    if not re.match(r'# .+\n\s*\n> .+', first): yield 'the first text cell is not a title, an empty line and `> one sentence`'
    heads = [(i, len(m[1]), m[2].strip()) for i, c in cells for m in re.finditer(r'^(#{1,6}) (.+)$', re.sub(r'^```.*?^```', '', source(c), flags=re.M | re.S), re.M)]
    for (_, a, _), (i, b, text) in zip(heads, heads[1:]):
        if b > a + 1: yield f'cell {i}: the heading {text!r} skips a level'
        if b == 1: yield f'cell {i}: a second title, {text!r}'
    slugs = {t.replace(' ', '-') for _, _, t in heads} | {re.sub(r'[^\w-]', '', t.lower().replace(' ', '-')) for _, _, t in heads}
    for i, c in cells:
        for link in re.findall(r'\]\(([^)\s]+)\)|(?:src|href)="([^"]+)"', prose(c)):
            target = link[0] or link[1]
            if re.match(r'[a-z]+:', target) or c.get('attachments'): continue
            name, _, anchor = target.partition('#')
            if name and not (path.parent/name).exists(): yield f'cell {i}: the link {target} leads nowhere'
            if not name and anchor not in slugs: yield f'cell {i}: there is no heading for #{anchor}'

def lint_notebook(path):
    "All that is wrong with one notebook."
    nb = read(path)
    cells = list(enumerate(nb['cells']))
    coded, text = ([(i, c) for i, c in cells if c['cell_type'] == t] for t in ('code', 'markdown'))
    where = path.relative_to(NBS).as_posix() if path.is_relative_to(NBS) else path.name
    exports = any(has(c, *EXPORT) for _, c in coded)
    if exports and not (coded and coded[0][0] == 0 and has(coded[0][1], 'default_exp')): yield 'exports, but does not begin with `#| default_exp`'
    if nb.get('nbformat') != 4 or nb.get('nbformat_minor', 0) < 5 or any('id' not in c for c in nb['cells']): yield 'not nbformat 4.5 with cell ids'
    if len(cells) > MAX_CELLS: yield f'{len(cells)} cells, more than {MAX_CELLS}'
    if path.stat().st_size > MAX_BYTES: yield f'{path.stat().st_size // 1000} KB, more than {MAX_BYTES // 1000}'
    yield from lint_code(coded, where)
    yield from lint_outputs(coded)
    yield from lint_prose(text, path)

def lint_house(paths):
    "What several notebooks must agree on."
    modules, pages = {}, {}
    for p in paths:
        for c in read(p)['cells']:
            for d in directives(c):
                if d[:1] == ['default_exp']: modules.setdefault(d[1], []).append(p)
        pages.setdefault(p.parent/re.sub(r'^\d+[a-z]?_', '', p.name), []).append(p)
    for what, table in (('export the module', modules), ('have the page', pages)):
        for k, ps in table.items():
            if len(ps) > 1: yield f"{', '.join(str(p.relative_to(ROOT)) for p in ps)} {what} {k if isinstance(k, str) else k.stem}"
    numbered = {d for p in paths for d in p.relative_to(NBS).parts[:-1] if re.match(r'\d', d)}
    listed = set(re.findall(r'href: ([\w/.-]+\.ipynb)', (NBS/'sidebar.yml').read_text()))
    there = {p.relative_to(NBS).as_posix() for p in paths}
    for p in sorted(there - listed): yield f'nbs/sidebar.yml lacks {p}'
    for p in sorted(listed - there): yield f'nbs/sidebar.yml lists {p}, which does not exist'
    for d in numbered: yield f'the folder {d} begins with a number, so its links would be dead'

def cmd_lint(args):
    paths = [Path(p).resolve() for p in args.names] or notebooks()
    flags = set(re.search(r'^tst_flags\s*=\s*(.*)$', (ROOT/'settings.ini').read_text(), re.M)[1].split())
    hidden, found = Counter(), 0
    for p in paths:
        problems = list(lint_notebook(p))
        found += len(problems)
        for line in problems: print(f'{p.relative_to(ROOT)}: {line}')
        hidden.update(f for c in read(p)['cells'] for f in flags if has(c, f))
    for line in lint_house(notebooks()): print(line); found += 1
    kept = ', '.join(f'{n} {f}' for f, n in sorted(hidden.items())) or 'none'
    print(f'{len(paths)} notebooks, {found} problems; cells that the plain test leaves out: {kept}')
    return bool(found)


# Conformance: timm's own tests, taken from the source distribution of the installed version

def timm_tests(cache):
    "The path of timm's tests/test_models.py, downloaded once into `cache`."
    import timm
    where = Path(cache)/f'timm-{timm.__version__}'
    if not (where/'tests'/'test_models.py').is_file():
        where.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', 'timm', '--dest', str(where.parent),
                        f'timm=={timm.__version__}'], check=True)
        with tarfile.open(next(where.parent.glob(f'timm-{timm.__version__}.tar.gz'))) as tar:
            for member in tar.getmembers():
                if '/tests/' in member.name and member.isfile() and '..' not in member.name: tar.extract(member, where.parent, filter='data')
    return where/'tests'/'test_models.py'

def t2_plan(T, name, full):
    "(function, arguments) of the tests that `name` has to pass."
    import inspect
    import timm
    cfg = timm.get_pretrained_cfg(name)
    kind = 'test_model_default_cfgs' if cfg.pool_size else 'test_model_default_cfgs_non_std'
    takes_device = len(inspect.signature(getattr(T, kind)).parameters) == 3
    yield kind, (name, 1, 'meta') if takes_device else (name, 1)
    if not full: return
    yield from [('test_model_forward', (name, 1)), ('test_model_backward', (name, 2)), ('test_model_forward_intermediates', (name, 1)),
                ('test_model_forward_intermediates_features', (name, 1)), ('test_model_forward_fx', (name, 1)),
                ('test_model_backward_fx', (name, 2)), ('test_prune_intermediate_layers_contract', (name,))]
    if cfg.pool_size: yield 'test_model_forward_features', (name, 1)

def unless_fixed(check):
    "timm's check that resizes a model, for models with token MLPs turned around: these have to refuse."
    import pytest
    from vitlit.registry import model_info
    def checked(name, *args, **kw):
        if not model_info(name).fixed_tokens: return check(name, *args, **kw)
        with pytest.raises(ValueError, match='places'): check(name, *args, **kw)
    return checked

def cmd_t2(args):
    import importlib.util
    import warnings
    import pytest
    warnings.filterwarnings('error', message='Overwriting')              # a name of ours must not push out one of timm's
    import vitlit.models  # noqa: F401  (registers all names with timm)
    import timm
    warnings.filterwarnings('ignore')
    tests = Path(args.tests) if args.tests else timm_tests(args.cache or tempfile.mkdtemp(prefix='timm-tests-'))
    spec = importlib.util.spec_from_file_location('timm_test_models', tests)
    T = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(T)
    T._assert_frozen_survives_reset_and_resize = unless_fixed(T._assert_frozen_survives_reset_and_resize)
    mine = [n for n in timm.list_models() if timm.is_model(n) and timm.model_entrypoint(n).__module__ == 'vitlit.models']
    if not mine: print('vitlit.models registered no name with timm'); return 1
    unknown = [n for n in args.names if not any(fnmatch(m, n) for m in mine)]
    if unknown: print(f"no model of ours is called {', '.join(unknown)}"); return 1
    full = [m for m in mine if any(fnmatch(m, n) for n in args.names)]
    count = Counter()
    for name in mine if args.configs else full:
        for function, arguments in t2_plan(T, name, name in full):
            if not hasattr(T, function): print(f'absent  {function}'); count['absent'] += 1; continue
            start, buffer = time.time(), None
            try:
                with open(os.devnull, 'w') as null:
                    buffer, sys.stdout = sys.stdout, null                 # the tests print shapes
                    try: getattr(T, function)(*arguments)
                    finally: sys.stdout = buffer
                result, why = 'passed', ''
            except pytest.skip.Exception as e: result, why = 'skipped', f': {e}'
            except Exception as e: result, why = 'FAILED', f': {type(e).__name__}: {str(e)[:400]}'
            count[result] += 1
            if result != 'passed' or args.verbose: print(f'{result:8}{function}({name}) {time.time() - start:.1f} s{why}', flush=True)
    print(f"timm {timm.__version__}'s tests on {len(full)} models in full and {len(mine)} configurations: "
          f"{count['passed']} passed, {count['FAILED']} failed, {count['skipped']} skipped" + (f", {count['absent']} absent" if count['absent'] else ''))
    return bool(count['FAILED']) or not count['passed']


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = parser.add_subparsers(dest='command', required=True)
    p = sub.add_parser('readme')
    p.add_argument('--check', action='store_true', help='only compare')
    p.set_defaults(run=cmd_readme)
    p = sub.add_parser('lint')
    p.add_argument('names', nargs='*', help='notebooks; all if none is given')
    p.set_defaults(run=cmd_lint)
    p = sub.add_parser('t2')
    p.add_argument('names', nargs='*', help='names or patterns that get all tests')
    p.add_argument('--configs', action='store_true', help="also the configuration test of every name, on the meta device")
    p.add_argument('--tests', help="timm's tests/test_models.py, if it is here already")
    p.add_argument('--cache', help='folder that keeps the download')
    p.add_argument('--verbose', action='store_true')
    p.set_defaults(run=cmd_t2)
    args = parser.parse_args()
    sys.exit(int(args.run(args)))


if __name__ == '__main__': main()
