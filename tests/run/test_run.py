"""``quantpatch run`` with real processes: a script is run as Python runs it, and everything is quantized."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import attrs
import pytest
from typer.main import get_command

from quantpatch.cli.main import app
from quantpatch.errors import FileError, UnknownNameError
from quantpatch.run import RunSettings, launch
from quantpatch.run.launcher import _environment

NO_TORCH = "quantpatch run: no process imported torch, so that nothing was quantized\n"


@pytest.fixture
def write(tmp_path):
    def write(source, name="script.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(source))
        return str(path)

    return write


def run_settings(**given):
    """The settings of options that are given as on the command line."""
    block = {name: given.pop(name) for name in ("recipe", "skip", "include", "plugins") if name in given}
    names = ("method", "weight_method", "zero_points", "existing")
    calibration = {name: given.pop(name) for name in names if name in given}
    return RunSettings(block=block, calibration={"existing": "keep", **calibration}, **given)


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """What ``launch`` hands to Python, with a folder of the test's own for what is left there."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)

    def make(**settings):
        directory = tmp_path / "left"
        directory.mkdir(exist_ok=True)
        return _environment(run_settings(directory=str(directory), **settings))

    return make


def python(*arguments, env, cwd, **options):
    return subprocess.run(
        [sys.executable, *arguments], env=env, cwd=cwd, capture_output=True, text=True, timeout=300, **options
    )


def command(*arguments, cwd, **options):
    """The whole command, as a user types it."""
    return python("-m", "quantpatch", "run", *arguments, env=None, cwd=cwd, **options)


FACTS = """
    import json, multiprocessing, os, pickle, sys, threading
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, Dataset

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

    class Built(Dataset):
        def __len__(self):
            return 1
        def __getitem__(self, index):
            return built()

    def built(*results):
        name = type(Net().layer).__name__
        for result in results:
            result.put(name)
        return name

    def in_child(method):
        context = multiprocessing.get_context(method)
        results = context.Queue()
        process = context.Process(target=built, args=(results,))
        process.start()
        name = results.get()
        process.join()
        return name, process.exitcode

    class Last:
        # Looks once everything else is over.
        linear = nn.Linear
        write = os.write
        def __del__(self):
            self.write(1, f"at the end: {self.linear.__init__.__code__.co_filename}".encode())

    if __name__ == "__main__":
        net = Net()
        main = sys.modules["__main__"]
        facts = {
            "argv": sys.argv, "path": sys.path[0], "file": __file__, "spec": __spec__ and __spec__.name,
            "main": main.Net is Net, "same": type(pickle.loads(pickle.dumps(net))) is Net,
            "module": Net.__module__, "built": type(net.layer).__name__,
            "bootstrap": [p for p in sys.path if "quantpatch/run" in p],
            "loader": next(iter(DataLoader(Built(), num_workers=1))),
            **{method: in_child(method) for method in ("fork", "spawn", "forkserver")},
        }
        child = os.fork()
        if child == 0:
            built()
            sys.exit(7)
        facts["os.fork"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        names = []
        thread = threading.Thread(target=lambda: names.append(built()))
        thread.start()
        thread.join()
        facts["thread"] = names
        print(json.dumps(facts))
        last, net = Last(), None
        sys.exit(3)
"""


def test_a_script_and_all_its_children_run_as_ever_and_build_quantized_layers(write, tmp_path):
    script = write(FACTS)
    done = command("--skip", "Conv2d", "script.py", "--skip", "-m", "x y", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    first, _, last = done.stdout.partition("\n")
    assert json.loads(first) == {
        "argv": ["script.py", "--skip", "-m", "x y"],
        "path": str(tmp_path),
        "file": script,
        "spec": None,
        "main": True,
        "same": True,
        "module": "__main__",
        "built": "QuantLinear",
        "bootstrap": [],
        "loader": ["QuantLinear"],
        "fork": ["QuantLinear", 0],
        "spawn": ["QuantLinear", 0],
        "forkserver": ["QuantLinear", 0],
        "os.fork": 7,
        "thread": ["QuantLinear"],
    }
    assert last.startswith("at the end: ")
    assert "torch" in last  # torch's own __init__ is back
    assert "interception" not in last
    # The main process and its thread, the loader's worker, three children, one fork: each once.
    assert "quantpatch run: 7 layers replaced in 6 processes" in done.stderr
    assert done.stderr.count("torch.nn.Linear") == 1
    assert "Traceback" not in done.stderr


def test_a_module_runs_as_with_dash_m(write, tmp_path, environment):
    write("", "pack/__init__.py")
    write(FACTS.replace('("fork", "spawn", "forkserver")', "()"), "pack/part.py")
    done = python("-m", "pack.part", "-m", env=environment(), cwd=tmp_path)
    facts = json.loads(done.stdout.partition("\n")[0])
    assert facts["argv"] == [str(tmp_path / "pack" / "part.py"), "-m"]
    assert (facts["spec"], facts["path"]) == ("pack.part", str(tmp_path))
    assert (facts["main"], facts["same"], facts["built"]) == (True, True, "QuantLinear")


WORKER = """
    import os, sys, torch, torch.distributed as dist
    from torch import nn
    dist.init_process_group("gloo")
    torch.manual_seed(0)  # some others leave nothing but zeros behind the ReLU
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    for step in range(3):
        model(torch.full((2, 4), 1.0 + dist.get_rank())).sum().backward()
    ranges = model.module[0].input_quantizer.amax
    with open(f"rank{dist.get_rank()}", "w") as file:
        print(type(model.module[0]).__name__, ranges.item(), sys.argv[1:], file=file)
    dist.destroy_process_group()
"""


@pytest.mark.sweep(2)
@pytest.mark.parametrize("inside", [False, True], ids=["run torchrun", "torchrun run"])
def test_torchrun(inside, write, tmp_path):
    """Both ranks calibrate together: the range is that of the rank with the larger values."""
    write(WORKER)
    options = ["--calibrate", "2", "--audit"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    if inside:
        torchrun += ["--redirects", "2", "--log-dir", "logs", "-m", "quantpatch", "run"]
        done = python(*torchrun, *options, "script.py", "--x", env=None, cwd=tmp_path)
    else:
        done = command(*options, *torchrun, "script.py", "--x", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert (tmp_path / f"rank{rank}").read_text() == "QuantLinear 2.0 ['--x']\n"
    if inside:
        told = {path.read_text() for path in tmp_path.glob("logs/*/*/*/stderr.log")}
        assert len(told) == 2
    else:
        told = {done.stderr}
    for text in told:
        rank = next((rank for rank in (0, 1) if f"run, rank {rank}: 2 layers replaced\n" in text), None)
        assert rank is not None if inside else "quantpatch run: 4 layers replaced in 2 processes\n" in text
        both = "" if inside else "rank 0, rank 1: "
        assert f"{both}Sequential: 4 of 4 quantizers calibrated in 2 calls" in text, text
        assert "Sequential: 100.0% of" in text, text


def test_a_page_is_written_of_each_model_that_ran(write, tmp_path):
    for package in ("jinja2", "itables", "vl_convert"):
        pytest.importorskip(package)
    write(
        """
        import torch
        from torch import nn
        for model in (nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 2))):
            for _ in range(3):
                model(torch.ones(2, 4))
        """
    )
    done = command("--calibrate", "1", "--report", "page.html", "script.py", "--x", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    pages = sorted(tmp_path.glob("*.html"))
    assert [page.name for page in pages] == ["page-2.html", "page.html"]
    for page in pages:
        assert f"its page is {page}" in done.stderr
        assert "100.0% of" in page.read_text()
        assert "0.input_quantizer; range -1 to 1; 0.0% clipped" in page.read_text()
        assert "script.py --x" in page.read_text()
    assert "multiply-accumulates" not in done.stderr  # which --audit prints


def test_a_page_that_cannot_be_is_refused_before_the_script_runs(write, tmp_path):
    for package in ("jinja2", "itables", "vl_convert"):
        pytest.importorskip(package)
    write("raise SystemExit('ran')")
    done = command("--report", "page.pdf", "script.py", cwd=tmp_path)
    assert done.returncode == 2
    assert "call it page.html" in done.stderr


RAISING = """
    def inner(x):
        raise ValueError("what went wrong")
    def outer():
        try:
            inner(1)
        except ValueError as error:
            raise KeyError("second") from error
    import {imported}
    outer()
"""


@pytest.mark.parametrize("imported", ["os", "torch"])
def test_an_exception_has_the_traceback_that_python_gives(imported, write, tmp_path, environment):
    plain = python(write(RAISING.format(imported="os")), env=None, cwd=tmp_path)
    assert "Traceback" in plain.stderr
    script = write(RAISING.format(imported=imported))
    done = python(script, env=environment(), cwd=tmp_path)
    assert done.returncode == plain.returncode == 1
    assert done.stderr.startswith(plain.stderr)
    told = done.stderr.removeprefix(plain.stderr)
    assert told == NO_TORCH if imported == "os" else "0 layers replaced" in told


@pytest.mark.parametrize(
    ("leave", "code", "told"),
    [
        ("sys.exit()", 0, ""),
        ("sys.exit(5)", 5, ""),
        ("sys.exit('no such data')", 1, "no such data\n"),
        ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, None),
        ("raise KeyboardInterrupt", -signal.SIGINT, None),
        ("os._exit(4)", 4, None),
    ],
)
def test_exit_codes_are_the_scripts(leave, code, told, write, tmp_path, environment):
    script = write(f"import os, signal, sys\n{leave}\n")
    done = python(script, env=environment(), cwd=tmp_path)
    assert done.returncode == code
    if told is not None:
        assert done.stderr == told + NO_TORCH


def test_an_interrupted_script_ends_as_python_does_and_says_what_it_built(write, tmp_path, environment):
    script = write(
        """
        import sys, time
        from torch import nn
        model = nn.Linear(2, 2)
        print("built", flush=True)
        time.sleep(60)
        """
    )
    running = subprocess.Popen(
        [sys.executable, script], env=environment(), cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # Shells have what they start in the background ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert running.stdout.readline() == "built\n"
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in errors
    assert [line for line in errors.splitlines() if "quantpatch/" in line] == []
    assert "quantpatch run: 1 layer replaced" in errors
    assert not (tmp_path / "left").exists()


def test_what_is_left_float_is_reported_with_the_reason(write, tmp_path, environment):
    script = write(
        """
        from torch import nn
        class Mine(nn.Linear): ...
        nn.Conv2d(1, 1, 1), nn.Embedding(2, 2), Mine(1, 1), nn.LSTM(1, 1)
        """
    )
    done = python(script, env=environment(skip=["Conv*"], include=["Embedding"]), cwd=tmp_path)
    assert done.returncode == 0
    told = " ".join(done.stderr.split())  # no boxes around cells, as in other reports
    assert "2 layers replaced" in told
    assert "torch.nn.Conv2d skip='Conv*' 1" in told
    assert "__main__.Mine a subclass of torch.nn.Linear, for which there is no entry" in told
    assert "torch.nn.Embedding quantpatch.layers.embedding.QuantEmbedding" in told


LAUNCHERS = {
    "another Python": """
        import subprocess, sys, threading
        subprocess.run([sys.executable, "-c", "from torch import nn; nn.Linear(1, 1)"], check=True)
    """,
    "multiprocessing's fork": """
        import multiprocessing
        def build():
            from torch import nn
            nn.Linear(1, 1)
        process = multiprocessing.get_context("fork").Process(target=build)
        process.start()
        process.join()
    """,
    "a fork": """
        import os
        child = os.fork()
        if child == 0:
            from torch import nn
            nn.Linear(1, 1)
        else:
            os.waitpid(child, 0)
    """,
}


@pytest.mark.sweep(3)
@pytest.mark.parametrize("how", LAUNCHERS)
def test_a_script_without_torch_says_what_its_children_built(how, write, tmp_path, environment):
    done = python(write(LAUNCHERS[how]), env=environment(), cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr.startswith("quantpatch run: 1 layer replaced\n"), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "left").exists()


def test_a_sitecustomize_of_the_users_own_still_runs(write, tmp_path, environment):
    write("import builtins\nbuiltins.mine = 'ran'\n", "site/sitecustomize.py")
    script = write("import sys\nprint(mine, sys.modules['sitecustomize'].__file__)\n")
    env = environment()
    env["PYTHONPATH"] += os.pathsep + str(tmp_path / "site")
    done = python(script, env=env, cwd=tmp_path)
    assert done.stdout == f"ran {tmp_path / 'site' / 'sitecustomize.py'}\n"


def test_a_block_that_cannot_be_opened_in_a_child_ends_it_with_the_reason(write, tmp_path, environment):
    script = write("import torch\nprint('not reached')\n")
    done = python(script, env=environment(skip=["Linaer"]), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "quantpatch run: the block cannot be opened: unknown layer in skip 'Linaer'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    ("closed", "source"),
    [(">&- 2>&-", "import torch\nlayer = torch.nn.Linear(2, 2)\n"), (">&-", ""), ("2>&-", "")],
)
def test_a_script_whose_streams_are_closed_runs(closed, source, write, tmp_path):
    script = write(
        f"""
        import os, subprocess, sys
        {source.replace(chr(10), chr(10) + "        ")}
        child = subprocess.run([sys.executable, "-c", "import sys; sys.exit(7 if sys.stdout is None else 8)"])
        with open("ran", "w") as file:
            file.write(f"{{child.returncode}} {{type(globals().get('layer')).__name__}}")
        """
    )
    line = f"exec {sys.executable} -m quantpatch run {script} {closed}"
    done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # The child has its standard output just as it would have without the command.
    child = 7 if ">&-" in closed.replace("2>&-", "") else 8
    assert (tmp_path / "ran").read_text() == f"{child} {'QuantLinear' if source else 'NoneType'}"


def test_a_script_from_standard_input(tmp_path):
    done = command(
        "-", "one", cwd=tmp_path, input="import sys, torch\nprint(sys.argv, torch.nn.Linear(2, 2))\n"
    )
    assert (done.returncode, done.stdout.split("Linear")[0]) == (0, "['-', 'one'] Quant")


def test_a_script_that_clears_its_environment_and_forks_says_what_it_built(write, tmp_path, environment):
    script = write(
        """
        import os, torch
        torch.nn.Linear(2, 2)
        os.environ.clear()
        child = os.fork()
        if child == 0:
            torch.nn.Linear(2, 2)
            raise SystemExit(0)
        os.waitpid(child, 0)
        """
    )
    done = python("-W", "ignore", script, env=environment(), cwd=tmp_path)
    assert done.returncode == 0
    assert "2 layers replaced in 2 processes" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.sweep(2)
@pytest.mark.parametrize(("text", "main"), [("{", True), ('{"recipe": 3, "new": 1}', False)])
def test_a_variable_that_the_command_did_not_write_does_not_break_importing_torch(
    text, main, write, tmp_path, environment
):
    env = {**environment(), "QUANTPATCH_RUN": text}
    if not main:
        del env["QUANTPATCH_RUN_MAIN"]
    done = python(write("import torch\nprint(torch.nn.Linear(2, 2))\n"), env=env, cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("Linear(")
    assert "QUANTPATCH_RUN cannot be read" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_folder_of_a_run_that_was_killed_is_removed_by_the_next(write, tmp_path, monkeypatch):
    folders = tmp_path / "tmp"
    folders.mkdir()
    monkeypatch.setenv("TMPDIR", str(folders))
    killed = command(write("import os\nos.kill(os.getpid(), 9)\n"), cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(folders.iterdir())) == 1
    seen = command(write("import os, sys\nprint(os.listdir(sys.argv[1]))\n"), str(folders), cwd=tmp_path)
    assert len(eval(seen.stdout)) == 1  # its own
    assert list(folders.iterdir()) == []


# --- before anything runs ----------------------------------------------------------------------


@pytest.fixture
def executed(monkeypatch):
    """What ``launch`` would become, instead of becoming it."""
    calls = []

    def execve(path, arguments, environment):
        calls.append((path, arguments, environment))
        raise SystemExit(0)

    monkeypatch.setattr(os, "execve", execve)
    return calls


def test_the_settings_go_along_and_python_keeps_its_options(write, tmp_path, executed, monkeypatch):
    script = write("")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["/some/where", "/else"]))
    settings = run_settings(recipe="int8", skip=["Linear"], calibrate=3, audit=True)
    with pytest.raises(SystemExit):
        launch(settings, [script, "--flag"])
    ((path, arguments, environment),) = executed
    assert (path, arguments[0], arguments[-2:]) == (sys.executable, sys.executable, [script, "--flag"])
    options = [option for option in arguments[1:-2] if option != "-u"]
    assert options == subprocess._args_from_interpreter_flags()
    bootstrap, *rest = environment["PYTHONPATH"].split(os.pathsep)
    assert rest == ["/some/where", "/else"]
    assert (Path(bootstrap) / "sitecustomize.py").exists()
    found = RunSettings.from_json(environment["QUANTPATCH_RUN"])
    assert Path(found.directory).is_dir()
    Path(found.directory).rmdir()
    assert found == attrs.evolve(settings, directory=found.directory)


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        (["nothing.py"], {}, FileError, "there is no script 'nothing.py' in /"),
        (["nothing"], {}, FileError, "for a module write: quantpatch run -m nothing"),
        (["script.py"], {"skip": ["Linaer"]}, UnknownNameError, "Did you mean 'Linear'"),
        (["script.py"], {"skip": ["conv1"]}, UnknownNameError, "rules={'conv1': None}\\), which a plugin"),
        (["script.py"], {"skip": ["int4"]}, UnknownNameError, "It is a recipe"),
        (["script.py"], {"recipe": "int9"}, UnknownNameError, "unknown recipe 'int9'"),
        (["script.py"], {"method": "entropi"}, UnknownNameError, "Did you mean 'entropy'"),
        (["script.py"], {"plugins": ["nobody"]}, UnknownNameError, "unknown plugin 'nobody'"),
    ],
)
def test_what_cannot_work_is_reported_before_anything_runs(
    arguments, settings, error, message, write, tmp_path, executed, monkeypatch
):
    write("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        launch(run_settings(**settings), arguments)
    assert executed == []


def test_a_python_that_ignores_its_environment_is_refused(write, executed, monkeypatch):
    flags = SimpleNamespace(ignore_environment=1)
    monkeypatch.setattr(
        "quantpatch.run.launcher.sys", SimpleNamespace(flags=flags, executable=sys.executable)
    )
    with pytest.raises(FileError, match="started with -I or -E and ignores the environment variables"):
        launch(RunSettings(), [write("")])
    assert executed == []


def test_the_command_prints_an_error_in_one_message(tmp_path):
    done = command("nothing.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: there is no script 'nothing.py' in {tmp_path}\n"


def test_the_page_has_every_option():
    page = (Path(__file__).parents[2] / "docs" / "run.md").read_text()
    command = get_command(app).commands["run"]
    options = {option for p in command.params for option in p.opts if option.startswith("-")}
    assert {"--recipe", "-m"} < options
    assert [option for option in options if f"`{option}" not in page] == []
