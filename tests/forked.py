"""Scripts in processes that are forked from one that has imported their packages already: a run in a second.

What a run imports of this repository, it imports anew and from the folder of its script, as `python SCRIPT` does.
"""

import atexit
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import runpy
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]


def context():
    """Processes of the fork server, which is started by the first of them."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["preloaded"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # the server finds the module there
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    return found


class Forked:
    """`python SCRIPT ARGS` in the folder `cwd`. Ends with `wait`, which gives it what a finished subprocess has.

    env: variables to set beside those of this process. before: a function of this module to call first, as (name,
    *arguments). figures: whether they are drawn; sketches in their place save a second a run. path: folders to import
    from. limits: {resource.RLIMIT_...: bytes}."""

    def __init__(self, *args, cwd=ROOT, script="saq_cql.py", env=(), before=None, figures=False, path=(), limits=None):
        self.folder = tempfile.TemporaryDirectory()
        self.streams = [Path(self.folder.name, name) for name in ("stdout", "stderr")]
        for stream in self.streams:
            stream.touch()
        before = [*([before] if before else []), *([] if figures else [("sketch_figures",)])]
        job = (script, list(map(str, args)), str(cwd), {**os.environ, **dict(env)}, before, list(map(str, path)))
        self.process = context().Process(target=child, args=(*job, limits or {}, *map(str, self.streams)))
        self.process.start()

    @property
    def stdout(self):
        return self.streams[0].read_text(errors="replace")

    @property
    def stderr(self):
        return self.streams[1].read_text(errors="replace")

    @property
    def returncode(self):
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def kill(self):
        self.process.kill()
        return self.wait()

    def wait(self, timeout=300):
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"no end after {timeout} s: {self.stdout}{self.stderr}")
        return self


def child(script, args, cwd, env, before, path, limits, stdout, stderr):
    for name, number in ((stdout, 1), (stderr, 2)):
        file = os.open(name, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    encoding = env.get("PYTHONIOENCODING", "utf-8")
    sys.stdout = open(1, "w", encoding=encoding, buffering=1, closefd=False)
    sys.stderr = open(2, "w", encoding=encoding, buffering=1, closefd=False, errors="backslashreplace")
    multiprocessing.set_start_method("fork", force=True)  # whose locks (tqdm's) leave nothing behind when killed
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = [script, *args]
    folders = (ROOT, ROOT / "offline_envs")
    own = [
        name for name, module in sys.modules.items() if Path(getattr(module, "__file__", None) or "/").parent in folders
    ]
    for name in own:
        del sys.modules[name]
    sys.path[:] = [str(Path(script).resolve().parent), *path, *(p for p in sys.path if p not in (str(ROOT), ""))]
    for what, size in limits.items():
        resource.setrlimit(what, (size, size))
    for name, *arguments in before:
        globals()[name](*arguments)
    try:
        runpy.run_path(os.path.abspath(script), run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) or end.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    else:
        code = 0
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def signal_in_update(number, update):
    """Sends this process a signal in the middle of its gradient step number `update`, the quantizer's included."""
    import vqvae

    apply, calls = vqvae.apply_gradients, 0

    def apply_gradients(*optimizers):
        nonlocal calls
        calls += 1
        if calls == update:
            os.kill(os.getpid(), number)
        return apply(*optimizers)

    vqvae.apply_gradients = apply_gradients


def blow_up(update):
    """Multiplies all weights by 1e30 after gradient step number `update`."""
    import torch

    import vqvae

    apply, calls = vqvae.apply_gradients, 0

    def apply_gradients(*optimizers):
        nonlocal calls
        apply(*optimizers)
        calls += 1
        if calls == update:
            with torch.no_grad():
                [p.mul_(1e30) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]

    vqvae.apply_gradients = apply_gradients


def sketch_figures():
    """Figures in no time: their text, a hundred times."""
    from matplotlib.figure import Figure

    def savefig(figure, file):
        titles = [axes.get_title() for axes in figure.axes]
        lines = [line.get_xydata().tolist() for axes in figure.axes for line in axes.lines]
        file.write(repr((titles, lines)).encode() * 100)

    Figure.savefig = savefig
