#!/usr/bin/env python3
"""What no other tool checks of this repository.

python .ci/house.py readme [--check]    README.md out of nbs/index.ipynb, or: is it current?
python .ci/house.py lint [NOTEBOOK ...] measures and manners of the notebooks (ruff does the code)
python .ci/house.py tidy [NOTEBOOK ...] fold plumbing, join prints, as JupyterLab would write them
python .ci/house.py coverage FOLDER     exported functions that the measured tests never ran
"""

import argparse
import ast
import base64
import hashlib
import json
import os
import re
import struct
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / 'nbs'


# Notebooks, as far as the rules need them


def source(cell):
    return ''.join(cell['source'])


def directives(cell):
    "The words after `#|` at the top of a code cell, one list a line."
    lines = source(cell).splitlines() if cell['cell_type'] == 'code' else []
    return [line.lstrip()[2:].split() for line in lines if re.match(r'\s*#\s?\|', line)]


def has(cell, *words):
    return any(d and d[0].rstrip(':') in words for d in directives(cell))


def code(cell):
    "The source of a code cell without directives, and with magics blanked."
    lines = [line for line in source(cell).splitlines() if not re.match(r'\s*#\s?\|', line)]
    return '\n'.join('pass' if re.match(r'[%!]', line) else line for line in lines)


def notebooks():
    "All notebooks that nbdev sees."
    hidden = lambda p: any(part.startswith(('_', '.')) for part in p.relative_to(NBS).parts)
    return sorted(p for p in NBS.rglob('*.ipynb') if not hidden(p))


def read(path):
    return json.loads(Path(path).read_text(encoding='utf-8'))


# README


class _Table(HTMLParser):
    "Collect the cells of the tables in a piece of HTML."

    def __init__(self):
        super().__init__()
        self.rows, self.cell = [], None

    def handle_starttag(self, tag, attrs):
        if tag == 'tr':
            self.rows.append([])
        if tag in ('td', 'th'):
            self.cell = ''

    def handle_endtag(self, tag):
        if tag in ('td', 'th') and self.cell is not None:
            self.rows[-1].append(' '.join(self.cell.split()).replace('|', '\\|'))
            self.cell = None

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data


def html_table(html):
    "A table in HTML as one in markdown."
    parser = _Table()
    parser.feed(html)
    rows = [r for r in parser.rows if r]
    width = max(len(r) for r in rows)
    rows = [[''] * (width - len(r)) + r for r in rows]  # a short row misses index cells
    return '\n'.join('| ' + ' | '.join(r) + ' |' for r in [rows[0], ['---'] * width, *rows[1:]])


def top_level(text, base='nbs'):
    "Make relative links of a page in `base` work from the top of the repository."

    def fix(m):
        link = m[2]
        if re.match(r'[a-z]+:|[#/]', link):
            return m[0]
        return f"{m[1]}{os.path.normpath(f'{base}/{link}').replace(os.sep, '/')}{m[3]}"

    parts = re.split(r'(^```.*?^```)', text, flags=re.M | re.S)
    return ''.join(
        p if p.startswith('```') else re.sub(r'(\]\(|src=")([^)"\s]+)([)"])', fix, p) for p in parts
    )


def outputs_md(cell, images):
    "The outputs of a code cell as markdown; pictures are added to `images` ({path: bytes})."
    alt = next(
        (' '.join(d[1:]).strip('"\'') for d in directives(cell) if d and d[0] == 'fig-alt:'),
        'figure',
    )
    for n, out in enumerate(cell.get('outputs', [])):
        if out['output_type'] == 'stream':
            if out['name'] == 'stdout':
                yield '```text\n' + ''.join(out['text']).rstrip() + '\n```'
            continue
        data = {k: ''.join(v) if isinstance(v, list) else v for k, v in out.get('data', {}).items()}
        if 'image/png' in data:
            path = f"nbs/images/readme_{cell['id']}{f'_{n}' if n else ''}.png"
            images[path] = base64.b64decode(data['image/png'])
            yield f'![{alt}]({path})'
        elif 'text/markdown' in data:
            yield top_level(data['text/markdown']).rstrip()
        elif '<table' in data.get('text/html', ''):
            yield html_table(data['text/html'])
        elif 'text/plain' in data:
            yield '```text\n' + data['text/plain'].rstrip() + '\n```'


def readme(nb):
    "(text, {path: bytes}) of the README that belongs to the notebook `nb`."
    parts, images = [], {}
    for cell in nb['cells']:
        if cell['cell_type'] == 'markdown':
            parts.append(top_level(source(cell)).rstrip())
        if (
            cell['cell_type'] != 'code'
            or has(cell, 'hide', 'default_exp')
            or ['include:', 'false'] in directives(cell)
        ):
            continue
        text = '\n'.join(
            line for line in source(cell).splitlines() if not re.match(r'\s*#\s?\|', line)
        ).strip()
        if text and ['echo:', 'false'] not in directives(cell):
            if parts and parts[-1].startswith('```python'):  # imports and their use are one block
                text = parts.pop()[len('```python\n') : -len('\n```')] + '\n\n' + text
            parts.append(f'```python\n{text}\n```')
        if ['output:', 'false'] not in directives(cell):
            parts += outputs_md(cell, images)
    head = (
        '<!-- made from nbs/index.ipynb by `python .ci/house.py readme`; edit the notebook -->\n\n'
    )
    return head + '\n\n'.join(p for p in parts if p) + '\n', images


def cmd_readme(args):
    text, images = readme(read(NBS / 'index.ipynb'))
    files = {'README.md': text.encode(), **images}
    stale = [
        f
        for f, data in files.items()
        if not (ROOT / f).is_file() or (ROOT / f).read_bytes() != data
    ]
    left = [
        str(p.relative_to(ROOT))
        for p in NBS.glob('images/readme_*.png')
        if str(p.relative_to(ROOT)) not in files
    ]
    if args.check:
        for f in stale:
            print(f"{f} is not what nbs/index.ipynb gives; run: python .ci/house.py readme")
        for f in left:
            print(f"{f} belongs to no output of nbs/index.ipynb")
        return bool(stale or left)
    for f in left:
        (ROOT / f).unlink()
    for f in stale:
        (ROOT / f).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / f).write_bytes(files[f])
    print('README.md is current' + (f" (written: {', '.join(stale)})" if stale else ''))
    return 0


# Lint

MAX_CELLS, MAX_EXPORT, MAX_BYTES, MAX_FIGURES, MAX_DPI, MAX_PROSE = 90, 60, 800_000, 12, 100, 100
EXPORT = ('export', 'exports', 'exporti')
VIEW = 'application/vnd.jupyter.widget-view+json'
SLOW = "if os.environ.get('VITLIT_SLOW') == '1':"
UNWANTED = {
    'a machine path': (
        r'(?<![\w.~:/])/(?:home|root|tmp|usr|opt|work|Users|mnt|private|var)/[\w.-]'
        r'|[A-Z]:\\\\?\w+\\'
    ),
    'a warning': r'\bWarning\b|\bWARNING\b|\bDeprecat',
    'a time': (
        r'\b\d\d:\d\d(?::\d\d)?\b|Wall time|CPU times|\d\s?(?:s|ms|µs|us|ns)\s?±'
        r'|\b\d+(?:\.\d+)? (?:seconds|minutes) (?:ago|elapsed)'
    ),
    'a progress bar': r'█|it/s\]|\bs/it\b|<progress|\d%\|',
    'a memory address': r'\bat 0x[0-9a-f]{6,}',
    'a version': (
        r'\b(?:torch|torchvision|timm|fastai|captum|numpy|python|matplotlib)'
        r'[ =]{1,3}v?\d+\.\d+\.\d+'
    ),
}


def is_import(node):
    return isinstance(node, (ast.Import, ast.ImportFrom))


def imports_mixed(tree):
    "Does a cell import at top level and do something else as well?"
    quiet = lambda n: (
        isinstance(n, ast.Expr)
        and isinstance(n.value, ast.Constant)
        or isinstance(n, ast.Assign)
        and all(isinstance(t, ast.Name) and t.id == '_all_' for t in n.targets)
    )
    return any(map(is_import, tree.body)) and not all(is_import(n) or quiet(n) for n in tree.body)


def png_info(data):
    "(width, height, dots per inch or None) of a PNG file."
    w, h = struct.unpack('>II', data[16:24])
    at = data.find(b'pHYs')
    return w, h, struct.unpack('>I', data[at + 4 : at + 8])[0] * 0.0254 if at > 0 else None


def prose(cell):
    "Markdown without fenced code, code spans and formulas."
    text = re.sub(r'^```.*?^```', '', source(cell), flags=re.M | re.S)
    return re.sub(r'`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$', '', text, flags=re.S)


def prose_lines(cell):
    "Lines of markdown that can be broken: no code, tables, headings, formulas or addresses."
    text = re.sub(r'^```.*?^```|^\$\$.*?\$\$', '', source(cell), flags=re.M | re.S)
    text = re.sub(r'\]\([^)]*\)', ']', text)
    return [line for line in text.splitlines() if not re.match(r'\s*(\||#|<|\$\$)', line)]


def lint_code(cells):
    "Imports, folding and lengths of the code cells."
    for i, c in cells:
        try:
            tree = ast.parse(code(c))
        except SyntaxError:
            continue  # ruff says it better
        if imports_mixed(tree):
            yield f'cell {i} mixes imports with other code'
        folded = c['metadata'].get('jupyter', {}).get('source_hidden')  # False: shown on purpose
        if tree.body and all(map(is_import, tree.body)) and folded is None:
            yield f'cell {i} imports and is not folded (metadata: jupyter.source_hidden)'
        if ['eval:', 'false'] in directives(c):
            yield f'cell {i} is never run (eval: false); use a flag such as slow'
        if 'nbdev_export()' in code(c):
            yield f'cell {i} calls nbdev_export, which would rewrite the package during the tests'
        if folded is None and is_folded(c):
            yield f'cell {i} is plumbing and not folded (metadata: jupyter.source_hidden)'
        if has(c, 'slow', 'train') and not code(c).strip().startswith(SLOW):
            yield f'cell {i} would run with all others in JupyterLab; begin it with `{SLOW}`'
        n = len(code(c).strip().splitlines())
        if has(c, *EXPORT) and n > MAX_EXPORT:
            yield f'cell {i} exports {n} lines, more than {MAX_EXPORT}'


def is_folded(c):
    "Does a cell ask to be folded: plumbing, or what Quarto folds on the published page?"
    return has(c, 'export', 'exporti', 'hide') or ['code-fold:', 'true'] in directives(c)


def lint_outputs(cells):
    "What a reader sees below the cells."
    figures = 0
    for i, c in cells:
        if joined(c.get('outputs', [])) != c.get('outputs', []):
            yield f'cell {i} has prints in pieces, which JupyterLab joins; run house.py tidy'
        for out in c.get('outputs', []):
            if VIEW in out.get('data', {}):
                yield f'cell {i} has a saved widget; keep its static twin only'
            if out['output_type'] == 'error':
                yield f"cell {i} has a saved error ({out.get('ename')})"
            if out.get('name') == 'stderr':
                yield f'cell {i} has output on stderr'
            data = {
                k: ''.join(v) if isinstance(v, list) else str(v)
                for k, v in {'stream': out.get('text', ''), **out.get('data', {})}.items()
            }
            for kind, text in data.items():
                if kind.startswith('image/') and kind != 'image/svg+xml':
                    continue
                for what, pattern in UNWANTED.items():
                    m = re.search(pattern, text)
                    if m:
                        found = text[max(0, m.start() - 20) : m.end() + 20]
                        yield f'cell {i} has {what} in its output: …{found!r}…'
            if 'image/png' in data:
                figures += 1
                dpi = png_info(base64.b64decode(data['image/png']))[2]
                if dpi and dpi > MAX_DPI + 1:
                    yield f'cell {i} has a figure of {dpi:.0f} dpi, more than {MAX_DPI}'
    if figures > MAX_FIGURES:
        yield f'{figures} figures, more than {MAX_FIGURES}'
    if cells and not any(c.get('outputs') for _, c in cells):
        yield 'no saved outputs: a reader sees no result'


def lint_prose(cells, path):
    "Title, headings and links."
    first = next((source(c) for _, c in cells), '')
    if not re.match(r'# .+\n\s*\n> .+', first):
        yield 'the first text cell is not a title, an empty line and `> one sentence`'
    heads = [
        (i, len(m[1]), m[2].strip())
        for i, c in cells
        for m in re.finditer(
            r'^(#{1,6}) (.+)$', re.sub(r'^```.*?^```', '', source(c), flags=re.M | re.S), re.M
        )
    ]
    for (_, a, _), (i, b, text) in zip(heads, heads[1:]):
        if b > a + 1:
            yield f'cell {i}: the heading {text!r} skips a level'
        if b == 1:
            yield f'cell {i}: a second title, {text!r}'
    for i, c in cells:
        wide = [line for line in prose_lines(c) if len(line) > MAX_PROSE]
        if wide:
            yield f'cell {i}: {len(wide)} lines of prose over {MAX_PROSE} columns: {wide[0][:40]!r}'
    slugs = {t.replace(' ', '-') for _, _, t in heads} | {
        re.sub(r'[^\w-]', '', t.lower().replace(' ', '-')) for _, _, t in heads
    }
    for i, c in cells:
        for link in re.findall(r'\]\(([^)\s]+)\)|(?:src|href)="([^"]+)"', prose(c)):
            target = link[0] or link[1]
            if re.match(r'[a-z]+:', target) or c.get('attachments'):
                continue
            name, _, anchor = target.partition('#')
            if name and not (path.parent / name).exists():
                yield f'cell {i}: the link {target} leads nowhere'
            if not name and anchor not in slugs:
                yield f'cell {i}: there is no heading for #{anchor}'


def lint_notebook(path):
    "All that is wrong with one notebook."
    nb = read(path)
    cells = list(enumerate(nb['cells']))
    coded, text = ([(i, c) for i, c in cells if c['cell_type'] == t] for t in ('code', 'markdown'))
    exports = any(has(c, *EXPORT) for _, c in coded)
    if exports and not (coded and coded[0][0] == 0 and has(coded[0][1], 'default_exp')):
        yield 'exports, but does not begin with `#| default_exp`'
    if (
        nb.get('nbformat') != 4
        or nb.get('nbformat_minor', 0) < 5
        or any('id' not in c for c in nb['cells'])
    ):
        yield 'not nbformat 4.5 with cell ids'
    if len(cells) > MAX_CELLS:
        yield f'{len(cells)} cells, more than {MAX_CELLS}'
    if path.stat().st_size > MAX_BYTES:
        yield f'{path.stat().st_size // 1000} KB, more than {MAX_BYTES // 1000}'
    yield from lint_code(coded)
    yield from lint_outputs(coded)
    yield from lint_prose(text, path)


def lint_house(paths):
    "What several notebooks must agree on."
    modules, pages = {}, {}
    for p in paths:
        for c in read(p)['cells']:
            for d in directives(c):
                if d[:1] == ['default_exp']:
                    modules.setdefault(d[1], []).append(p)
        pages.setdefault(p.parent / re.sub(r'^\d+[a-z]?_', '', p.name), []).append(p)
    for what, table in (('export the module', modules), ('have the page', pages)):
        for k, ps in table.items():
            if len(ps) > 1:
                names = ', '.join(str(p.relative_to(ROOT)) for p in ps)
                yield f'{names} {what} {k if isinstance(k, str) else k.stem}'
    numbered = {d for p in paths for d in p.relative_to(NBS).parts[:-1] if re.match(r'\d', d)}
    listed = set(re.findall(r'href: ([\w/.-]+\.ipynb)', (NBS / 'sidebar.yml').read_text()))
    there = {p.relative_to(NBS).as_posix() for p in paths}
    for p in sorted(there - listed):
        yield f'nbs/sidebar.yml lacks {p}'
    for p in sorted(listed - there):
        yield f'nbs/sidebar.yml lists {p}, which does not exist'
    for d in numbered:
        yield f'the folder {d} begins with a number, so its links would be dead'


def cmd_lint(args):
    paths = [Path(p).resolve() for p in args.names] or notebooks()
    flags = set(
        re.search(r'^tst_flags\s*=\s*(.*)$', (ROOT / 'settings.ini').read_text(), re.M)[1].split()
    )
    hidden, found = Counter(), 0
    for p in paths:
        problems = list(lint_notebook(p))
        found += len(problems)
        for line in problems:
            print(f'{p.relative_to(ROOT)}: {line}')
        hidden.update(f for c in read(p)['cells'] for f in flags if has(c, f))
    for line in lint_house(notebooks()):
        print(line)
        found += 1
    kept = ', '.join(f'{n} {f}' for f, n in sorted(hidden.items())) or 'none'
    print(f'{len(paths)} notebooks, {found} problems; cells that the plain test leaves out: {kept}')
    return bool(found)


# Tidying: what nbdev_clean leaves


def joined(outputs):
    "Outputs of which neighbors on the same stream are one, as JupyterLab keeps them."
    found = []
    for out in outputs:
        if found and out['output_type'] == 'stream' and found[-1].get('name') == out['name']:
            both = ''.join(found[-1]['text']) + ''.join(out['text'])
            found[-1] = found[-1] | dict(text=both.splitlines(keepends=True))
        else:
            found.append(out)
    return found


def passing(out):
    "Is an output a widget, or a progress bar that has removed itself?"
    data = out.get('data', {})
    return VIEW in data or ''.join(data.get('text/html', 'x')) == ''


def tidy(nb):
    "Fold plumbing, join prints, drop what passes and name a notebook's kernel; returns it."
    for c in nb['cells']:
        if c['cell_type'] == 'code':
            c['outputs'] = joined([o for o in c['outputs'] if not passing(o)])
            if is_folded(c):
                c['metadata'].setdefault('jupyter', {}).setdefault('source_hidden', True)
    kernel = dict(display_name='python3', language='python', name='python3')
    nb['metadata'].setdefault('kernelspec', kernel)
    nb['metadata'].pop('widgets', None)
    return nb


def cmd_tidy(args):
    for p in [Path(p).resolve() for p in args.names] or notebooks():
        old = p.read_text(encoding='utf-8')
        new = json.dumps(tidy(json.loads(old)), indent=1, ensure_ascii=False, sort_keys=True) + '\n'
        if new != old:
            temp = p.with_suffix('.tmp')
            temp.write_text(new, encoding='utf-8')
            temp.replace(p)
            print(p.relative_to(ROOT))


# Coverage: which exported functions did the measured tests run?


def functions(tree, prefix=''):
    "(qualified name, lines of the body) of every function and method that a module defines."
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield from functions(node, f'{prefix}{node.name}.')
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            lines = range(body[0].lineno, node.end_lineno + 1)
            if body[0].lineno > node.lineno:
                yield prefix + node.name, lines


def measured(data, path):
    "The names of the functions in the file `path` of which a line ran."
    ran = set(data.lines(str(path)) or ())
    return {
        name
        for name, lines in functions(ast.parse(path.read_text(encoding='utf-8')))
        if ran & set(lines)
    }


def public(names):
    "The functions and methods without a leading underscore in any part of their name."
    return {n for n in names if not any(part.startswith('_') for part in n.split('.'))}


def cmd_coverage(args):
    from coverage import CoverageData

    folder = Path(args.folder)
    data = CoverageData(str(folder / 'coverage'))
    data.read()
    cells = {
        Path(f).name: Path(f) for f in data.measured_files() if Path(f).parent == folder / 'cells'
    }
    modules = {
        Path(f).resolve(): f
        for f in data.measured_files()
        if Path(f).suffix == '.py' and 'cells' not in Path(f).parts
    }
    missing, total = [], 0
    for nb in notebooks():
        exported = [c for c in read(nb)['cells'] if c['cell_type'] == 'code' and has(c, *EXPORT)]
        module = next(
            (d[1] for c in read(nb)['cells'] for d in directives(c) if d[:1] == ['default_exp']),
            None,
        )
        if module is None:
            continue
        ran = set()
        for c in exported:
            name = cell_name(source(c))
            if name in cells:
                ran |= measured(data, cells[name])
        path = ROOT / 'vitlit' / f"{module.replace('.', '/')}.py"
        if path in modules:
            ran |= measured(data, path)
        names = public(n for n, _ in functions(ast.parse(path.read_text(encoding='utf-8'))))
        total += len(names)
        missing += [f'{module}: {n}' for n in sorted(names - ran)]
    for line in missing:
        print(f'exported, but no test ran it: {line}')
    print(f'{total} exported functions and methods, {len(missing)} never ran')
    return bool(missing) or not total


def cell_name(text):
    "The file that .ci/measure gives to a cell; nbdev hands it to IPython without directives."
    text = re.sub(r'^\s*#\s?\|.*\n?', '', text, flags=re.M)
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16] + '.py'


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sub = parser.add_subparsers(dest='command', required=True)
    p = sub.add_parser('readme')
    p.add_argument('--check', action='store_true', help='only compare')
    p.set_defaults(run=cmd_readme)
    p = sub.add_parser('lint')
    p.add_argument('names', nargs='*', help='notebooks; all if none is given')
    p.set_defaults(run=cmd_lint)
    p = sub.add_parser('tidy')
    p.add_argument('names', nargs='*', help='notebooks; all if none is given')
    p.set_defaults(run=cmd_tidy)
    p = sub.add_parser('coverage')
    p.add_argument('folder', help='what VITLIT_MEASURE named')
    p.set_defaults(run=cmd_coverage)
    args = parser.parse_args()
    sys.exit(int(args.run(args) or 0))


if __name__ == '__main__':
    main()
