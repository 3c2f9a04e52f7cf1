"""How JupyterLab reads and writes notebooks: as the repository keeps them.

jupyter lab --config .ci/jupyter.py nbs/index.ipynb

A page that is opened gets what its kernel says of itself, which JupyterLab would otherwise write
into it at once and ask about on closing. A page that is saved loses what belongs to one run or to
one machine: counts, the kernel's version, views of widgets, progress bars that removed themselves.
So opening, running and closing a page leaves `git status` clean.
"""

from ipykernel.ipkernel import IPythonKernel
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
from nbdev.clean import clean_jupyter

VIEW = 'application/vnd.jupyter.widget-view+json'


def passing(out):
    "Is an output a widget, or a progress bar that has removed itself?"
    data = out.get('data', {})
    return VIEW in data or ''.join(data.get('text/html', 'x')) == ''


class PagesManager(AsyncLargeFileManager):
    "Jupyter's manager of files, which knows what of a notebook stands in git."

    async def get(self, path, *args, **kwargs):
        model = await super().get(path, *args, **kwargs)
        if model['type'] == 'notebook' and model['content']:
            meta = model['content']['metadata']
            if meta.setdefault('kernelspec', {}).setdefault('name', 'python3') == 'python3':
                spec = KernelSpecManager().get_kernel_spec('python3')
                meta['kernelspec'].update(display_name=spec.display_name, language=spec.language)
                meta['language_info'] = dict(IPythonKernel.language_info)
        return model

    def run_pre_save_hooks(self, model, path, **kwargs):
        super().run_pre_save_hooks(model, path, **kwargs)
        if model['type'] == 'notebook':
            clean_jupyter(self._get_os_path(path), model)
            model['content']['metadata'].pop('widgets', None)
            for cell in model['content']['cells']:
                if 'outputs' in cell:
                    cell['outputs'] = [o for o in cell['outputs'] if not passing(o)]


c = get_config()  # noqa: F821  Jupyter defines it for this file
c.ServerApp.contents_manager_class = PagesManager
