"""Building Horovod, on a source of the same shape that compiles in a second."""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
import venv
import zipfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from tests.jobs import is_gone
from tfdist import cli
from tfdist.cluster.cache import cache_folder
from tfdist.errors import BuildError
from tfdist.launch.horovod_wheel import build as horovod_build
from tfdist.launch.horovod_wheel.progress import progress, time_share
from tfdist.launch.horovod_wheel.recipe import (
    HOROVOD,
    Recipe,
    cached_wheel,
    check_tools,
    jobs_for_here,
    minutes,
    recipe_for_here,
    search_path,
)
from tfdist.launch.horovod_wheel.source import CHANGES, change_source
from tfdist.launch.horovod_wheel.steps import cause, run_step, step_runner

quick = pytest.mark.quick
LIMIT_S = 120

SETUP = """
import os, subprocess, sys, time
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

class CMake(build_ext):
    def build_extensions(self):
        if "PID_FILE" in os.environ:
            with open(os.environ["PID_FILE"], "w") as file:
                file.write(str(os.getpid()))
            time.sleep(300)
        os.makedirs("b")
        subprocess.check_call(["cmake", ".."], cwd="b")
        subprocess.check_call(["cmake", "--build", ".", "--", "VERBOSE=1"], cwd="b")
        os.makedirs(self.build_lib, exist_ok=True)
        with open(os.path.join(self.build_lib, "horovod_options"), "w") as file:
            file.write(repr({n: v for n, v in os.environ.items() if n.startswith("HOROVOD_")}))

setup(
    name="horovod", version="0.28.1", packages=["horovod"],
    ext_modules=[Extension("horovod.mpi_lib", [])], cmdclass={"build_ext": CMake},
)
"""
PROJECT = {
    # Of an age that CMake 4 refuses by itself.
    "CMakeLists.txt": """
        cmake_minimum_required(VERSION 2.8.12)
        project(horovod CXX C)
        add_subdirectory(horovod/tensorflow)
        """,
    "horovod/tensorflow/CMakeLists.txt": """
        list(APPEND TF_SOURCES "${PROJECT_SOURCE_DIR}/horovod/tensorflow/mpi_ops.cc")
        list(APPEND TF_SOURCES "${PROJECT_SOURCE_DIR}/horovod/tensorflow/xla_mpi_ops.cc")
        add_library(tensorflow SHARED ${TF_SOURCES})
        """,
    "horovod/tensorflow/mpi_ops.cc": "int one() { return 1; }\n",
    "horovod/common/gloo/gloo_controller.cc": "  global_ranks_.reserve(size_);\n",
    "horovod/common/gloo/gloo_context.cc": "  assert(global_context.IsEnabled());\n",
    "horovod/__init__.py": "__version__ = '0.28.1'\n",
    "setup.py": SETUP,
}


@pytest.fixture
def environ(tmp_path) -> dict[str, str]:
    """Variables with which pip knows one source of Horovod, and no other package."""
    ours = ("HOROVOD_", "TFDIST_", "XDG_", "PIP_", "MAKE", "CXX", "CC")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    index = tmp_path / "index"
    index.mkdir()
    return clean | {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(index),
        "PIP_CONFIG_FILE": os.devnull,
        "TFDIST_CACHE_DIR": str(tmp_path / "cache"),
    }


@pytest.fixture
def source(environ):
    """Puts a source into pip's index."""

    def put(**changes: str) -> None:
        path = Path(environ["PIP_FIND_LINKS"], f"horovod-{HOROVOD}.tar.gz")
        with tarfile.open(path, "w:gz") as archive:
            for name, text in {**PROJECT, **changes}.items():
                data = textwrap.dedent(text).encode()
                entry = tarfile.TarInfo(f"horovod-{HOROVOD}/{name}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))

    return put


@pytest.fixture
def screen() -> Console:
    return Console(file=io.StringIO(), width=200)


def shown(screen: Console) -> str:
    return screen.file.getvalue()


def command(environ, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tfdist.cli", "horovod", "build", *options],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def cached(environ) -> list[str]:
    """The files of this recipe's folder."""
    folder = cache_folder(None, environ) / "horovod" / recipe_for_here(environ).key
    return sorted(path.name for path in folder.iterdir())


def tiny_wheel(
    folder: Path, name: str = "horovod", module: str = "one", needs: str = ""
) -> Path:
    """A wheel that pip installs, with the least that it must hold."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{HOROVOD}-py3-none-any.whl"
    info = f"{name}-{HOROVOD}.dist-info"
    files = {
        f"{name}/{module}.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {HOROVOD}\n{needs}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    return path


@quick
class TestRecipe:
    recipe = Recipe("2.21.0", "tensorflow", "cp311", "linux-x86_64-glibc2.36")

    def test_each_part_has_its_own_key(self):
        changes = {
            "tensorflow": "2.20.0",
            "package": "tensorflow-cpu",
            "python": "cp312",
            "platform": "linux-aarch64-glibc2.36",
            "options": (("HOROVOD_WITH_MPI", "1"),),
            "horovod": "0.29.0",
            "changes": "none",
        }
        assert set(changes) == {field.name for field in dataclasses.fields(Recipe)}
        others = {dataclasses.replace(self.recipe, **{n: v}).key for n, v in changes.items()}
        assert len(others - {self.recipe.key}) == len(changes)

    def test_key_is_a_folder_name(self):
        odd = dataclasses.replace(self.recipe, tensorflow="2.22.0.dev1+a/b", platform="a b:c")
        assert set(odd.key).isdisjoint("/ :")

    def test_key_of_options_depends_on_their_values(self):
        one, other = (
            dataclasses.replace(self.recipe, options=(("HOROVOD_GPU_OPERATIONS", value),)).key
            for value in ("NCCL", "MPI")
        )
        assert one != other

    def test_here(self):
        recipe = recipe_for_here({})
        assert recipe.tensorflow == metadata.version(recipe.package)
        assert recipe.python.startswith(f"cp{sys.version_info.major}{sys.version_info.minor}")
        assert recipe.options == ()
        assert recipe == recipe_for_here({"HOROVOD_RANK": "1", "HOROVOD_WITH_MPI": ""})

    def test_only_what_changes_the_wheel_is_an_option(self):
        build = {
            "HOROVOD_GPU_OPERATIONS": "NCCL",
            "HOROVOD_NCCL_HOME": "/nccl",
            "HOROVOD_WITH_MPI": "1",
        }
        run = {
            "HOROVOD_NUM_NCCL_STREAMS": "2",
            "HOROVOD_FUSION_THRESHOLD": "0",
            "HOROVOD_CMAKE": "/cmake",
            "HOROVOD_GLOO_RENDEZVOUS_ADDR": "host",
        }
        assert dict(recipe_for_here({**run, **build}).options) == build

    def test_what_the_user_set_comes_first(self):
        plain = self.recipe.environment
        assert plain["HOROVOD_WITH_TENSORFLOW"] == plain["HOROVOD_WITHOUT_MPI"] == "1"
        options = (("HOROVOD_WITHOUT_PYTORCH", "0"), ("HOROVOD_WITH_MPI", "1"))
        chosen = dataclasses.replace(self.recipe, options=options).environment
        assert "HOROVOD_WITHOUT_MPI" not in chosen
        assert chosen["HOROVOD_WITHOUT_PYTORCH"] == "0"
        assert chosen["HOROVOD_WITHOUT_MXNET"] == "1"

    def test_description_names_the_options(self):
        options = (("HOROVOD_WITH_MPI", "1"),)
        described = dataclasses.replace(self.recipe, options=options).describe()
        assert described == (
            "Horovod 0.28.1 for TensorFlow 2.21.0, Python 3.11, HOROVOD_WITH_MPI=1"
        )

    @pytest.mark.parametrize("name", ["HOROVOD_SKIP_COMPILE", "HOROVOD_WITHOUT_TENSORFLOW"])
    def test_not_without_tensorflow(self, name):
        with pytest.raises(BuildError, match=f"Received: {name}=1 .* Unset {name}"):
            recipe_for_here({name: "1"})


@quick
class TestCache:
    def test_folder(self, tmp_path):
        both = {"TFDIST_CACHE_DIR": "/ours", "XDG_CACHE_HOME": "/xdg"}
        assert cache_folder(tmp_path, both) == tmp_path
        assert cache_folder(Path("here"), both) == Path.cwd() / "here"
        assert cache_folder(None, both) == Path("/ours")
        assert cache_folder(None, {"XDG_CACHE_HOME": "/xdg"}) == Path("/xdg/tfdist")
        assert cache_folder(None, {}) == Path.home() / ".cache" / "tfdist"

    def test_only_whole_wheels_are_found(self, tmp_path):
        assert cached_wheel(tmp_path / "missing") is None
        wheel = tiny_wheel(tmp_path)
        assert cached_wheel(tmp_path) == wheel
        whole = wheel.read_bytes()
        wheel.write_bytes(whole[: len(whole) // 2])
        assert cached_wheel(tmp_path) is None
        wheel.rename(tmp_path / f".{wheel.name}.1.part")
        assert cached_wheel(tmp_path) is None

    def test_kept_wheel_is_not_built_again(self, environ, screen):
        recipe = recipe_for_here(environ)
        wheel = tiny_wheel(cache_folder(None, environ) / "horovod" / recipe.key)
        # Neither pip nor a compiler is needed.
        found = horovod_build.build(environ=environ | {"PATH": ""}, console=screen)
        assert found == wheel
        assert "already built" in shown(screen)
        assert str(wheel.parent) in shown(screen)

    def test_folder_that_cannot_be_written(self, environ, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(BuildError, match=r"must be writable\. Received: .*`--cache-dir`"):
            horovod_build.build(cache_dir=tmp_path / "file", environ=environ)


@quick
class TestTools:
    def test_all_that_is_missing_is_named_at_once(self):
        with pytest.raises(BuildError) as raised:
            check_tools({}, "")
        message = str(raised.value)
        for tool in ("no cmake", "no C compiler", "no C++ compiler", "no make"):
            assert tool in message
        assert 'pip install "tfdist[horovod]"' in message
        assert "apt install g++ make" in message

    def test_old_and_broken_tools(self, tmp_path):
        scripts = {
            "cmake": "echo cmake version 3.12.4",
            "make": "",
            "gcc": "",
            "g++": "echo unrecognized command-line option >&2; exit 1",
        }
        for name, body in scripts.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
            (tmp_path / name).chmod(0o755)
        path = f"{tmp_path}:/bin"
        with pytest.raises(BuildError) as raised:
            check_tools({"CC": "gcc", "CXX": "g++ -m64"}, path)
        message = str(raised.value)
        assert "no cmake 3.13 (" in message
        assert "no compiler that knows C++17 (g++ fails)" in message
        assert "no make" not in message
        assert "no C compiler" not in message

    def test_here(self):
        environ = dict(os.environ)
        path = search_path(environ)
        assert path.split(os.pathsep)[0] == str(Path(sys.executable).parent)
        if not all(shutil.which(tool, path=path) for tool in ("cmake", "c++", "make")):
            pytest.skip('no tools: `pip install "tfdist[horovod]"`, `apt install g++ make`')
        check_tools(environ, path)

    def test_jobs_and_minutes(self):
        assert 1 <= jobs_for_here() <= (os.cpu_count() or 1)
        assert minutes(1) > minutes(2) > minutes(8) >= 1


@quick
class TestProgress:
    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ("  [  1%] Building CXX object a/b.dir/algorithm.cc.o", (1, "algorithm.cc")),
            ("[ 45%] Building C object x.c.o", (45, "x.c")),
            ("  [ 75%] Linking CXX static library libgloo.a", (75, "libgloo.a")),
            ("  [100%] Built target tensorflow", (100, "tensorflow")),
            ("  cd /tmp && c++ '[ 45%] Building'", None),
            ("-- Detecting CXX compile features", None),
            ("  adding 'horovod/__init__.py'", None),
        ],
    )
    def test_lines(self, line, expected):
        assert progress(line) == expected

    def test_time_never_runs_backwards(self):
        shares = [time_share(percent) for percent in range(101)]
        assert shares == sorted(shares)
        assert shares[0] == 0
        assert shares[100] == 100


@quick
class TestChanges:
    LISTS, CONTROLLER, CONTEXT, PACKAGE = (change.file for change in CHANGES)

    @pytest.fixture
    def tree(self, tmp_path):
        lines = {
            self.LISTS: 'a\nlist(APPEND S "x/xla_mpi_ops.cc")\nb # mpi_ops.cc\n',
            self.CONTROLLER: "a\n  global_ranks_.reserve(size_);\n  data();\n",
            self.CONTEXT: "  assert(global_context.IsEnabled());\n",
            self.PACKAGE: "__version__ = '0.28.1'\n",
        }
        for name, text in lines.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    def test_only_these_lines(self, tree):
        change_source(tree)
        assert (tree / self.LISTS).read_text() == "a\nb # mpi_ops.cc\n"
        mended = "a\n  global_ranks_.resize(size_);\n  data();\n"
        assert (tree / self.CONTROLLER).read_text() == mended
        first, second = (tree / self.CONTEXT).read_text().splitlines()
        assert first == "  assert(global_context.IsEnabled());"
        assert second == "  gloo_iface_ = global_context.gloo_iface_;"
        told, version = (tree / self.PACKAGE).read_text().splitlines()
        assert told.startswith("keeps_to_interface = True")
        assert version == "__version__ = '0.28.1'"
        with pytest.raises(BuildError, match=r"must hold xla_mpi_ops\.cc\. Received: 0"):
            change_source(tree)

    @pytest.mark.parametrize("name", [LISTS, CONTROLLER, CONTEXT, PACKAGE])
    def test_another_source(self, tree, name):
        (tree / name).unlink()
        with pytest.raises(BuildError, match="Received: 0"):
            change_source(tree)


class TestCause:
    """On what compilers and CMake really write."""

    def failed(self, tmp_path, files: dict[str, str]) -> tuple[str, ...]:
        for name, text in files.items():
            (tmp_path / name).write_text(textwrap.dedent(text))
        path = search_path(os.environ)
        if shutil.which("cmake", path=path) is None:
            pytest.skip('no cmake: `pip install "tfdist[horovod]"`')
        done = subprocess.run(
            "cmake -B b . && cmake --build b -- VERBOSE=1 -j2",
            shell=True, cwd=tmp_path, env={**os.environ, "PATH": path, "LC_ALL": "C"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S,
            check=False,
        )  # fmt: skip
        assert done.returncode != 0
        indented = [f"  {line}" for line in done.stdout.splitlines()]
        return cause(
            [*indented, "error: subprocess-exited-with-error", "ERROR: Failed to build"]
        )

    LISTS = """
        cmake_minimum_required(VERSION 3.13)
        project(p CXX)
        add_library(p SHARED good.cc bad.cc)
        """

    def test_compiler(self, tmp_path):
        # The file that compiles warns so long that the error is far from the end.
        good = "".join(f"int f{i}() {{}}\n" for i in range(200))
        bad = "#include <string>\nstd::string text() { return nothing; }\n"
        files = {"CMakeLists.txt": self.LISTS, "good.cc": good, "bad.cc": bad}
        told = self.failed(tmp_path, files)
        assert "bad.cc:2" in told[0]
        assert "error: " in told[0]
        assert "nothing" in told[0]
        assert not any("make" in line for line in told)

    def test_linker(self, tmp_path):
        lists = self.LISTS.replace("add_library(p SHARED", "add_executable(p")
        files = {"CMakeLists.txt": lists, "good.cc": "int missing();\n"}
        told = self.failed(
            tmp_path, files | {"bad.cc": "int missing(); int main() { return missing(); }"}
        )
        assert "missing" in told[0]

    def test_cmake(self, tmp_path):
        lists = "cmake_minimum_required(VERSION 3.13)\nproject(p NONE)\n"
        lists += "find_package(Nowhere REQUIRED)\n"
        told = self.failed(tmp_path, {"CMakeLists.txt": lists})
        assert told[0].startswith("CMake Error at CMakeLists.txt:3 (find_package)")
        assert any("Nowhere" in line for line in told[1:])

    def test_python(self, tmp_path):
        code = "import not_there_at_all"
        done = subprocess.run(
            [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, check=False
        )
        told = cause(done.stderr.splitlines())
        assert told == ("ModuleNotFoundError: No module named 'not_there_at_all'",)

    @quick
    def test_no_error_to_be_seen(self):
        lines = [f"line {i}" for i in range(50)]
        assert cause(lines)[-1] == "line 49"
        assert len(cause(lines)) < 20
        assert cause([]) == ()


class TestSteps:
    def test_children_end_with_a_step_that_takes_too_long(self, tmp_path):
        code = (
            "import subprocess, sys, time\n"
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
            "print(child.pid, flush=True)\n"
            "time.sleep(300)\n"
        )
        lines: list[str] = []
        with pytest.raises(TimeoutError):
            run_step(
                [sys.executable, "-c", code], tmp_path / "log",
                cwd=tmp_path, environ=os.environ, limit_s=3, on_line=lines.append,
            )  # fmt: skip
        assert is_gone(int(lines[0]))
        assert (tmp_path / "log").read_text() == f"{lines[0]}\n"

    def test_output_and_status(self, tmp_path):
        code = "import os, sys; print('a'); os.write(2, b'b'); sys.exit(3)"
        lines: list[str] = []
        status = run_step(
            [sys.executable, "-u", "-c", code], tmp_path / "log",
            cwd=tmp_path, environ=os.environ, limit_s=60, on_line=lines.append,
        )  # fmt: skip
        assert status == 3
        assert (tmp_path / "log").read_text() == "a\nb"
        assert lines == ["a"]

    def test_failure_shows_its_own_cause_and_keeps_the_log(self, tmp_path, screen):
        folders = []

        def work():
            with step_runner(screen, dict(os.environ), tmp_path) as runner:
                folders.append(runner.folder)
                runner.run([sys.executable, "-c", "print('error: harmless')"], "The first", 60)
                runner.run([sys.executable, "-c", "raise ValueError('mine')"], "The second", 60)

        with pytest.raises(BuildError) as raised:
            work()
        message = str(raised.value)
        assert message.startswith("The second must end with exit status 0. Received: exit")
        assert "  | ValueError: mine" in message
        assert "harmless" not in message
        assert message.endswith(f"The whole log: {tmp_path / 'failure.log'}")
        assert "error: harmless" in (tmp_path / "failure.log").read_text()
        assert not folders[0].exists()


class TestBuild:
    @pytest.fixture(autouse=True)
    def _has_tools(self, environ):
        try:
            check_tools(environ, search_path(environ))
        except BuildError as error:
            pytest.skip(str(error))

    def test_builds_once(self, environ, source, screen):
        source()
        wheel = horovod_build.build(environ=environ, console=screen, jobs=1)
        assert cached(environ) == [wheel.name]
        assert "about 6 minutes on 1 core, once" in shown(screen)
        assert "Compiling: 100 %" in shown(screen)
        assert "Built in 0 min" in shown(screen)
        with zipfile.ZipFile(wheel) as archive:
            options = archive.read("horovod_options").decode()
        assert "'HOROVOD_WITHOUT_MPI': '1'" in options
        first = wheel.stat().st_mtime_ns
        assert horovod_build.build(environ=environ, console=screen) == wheel
        assert wheel.stat().st_mtime_ns == first
        assert horovod_build.build(environ=environ, console=screen, force=True) == wheel
        assert wheel.stat().st_mtime_ns != first

    def test_options_give_another_wheel(self, environ, source, screen):
        source()
        chosen = environ | {"HOROVOD_WITH_MPI": "1"}
        wheel = horovod_build.build(environ=chosen, console=screen)
        assert "HOROVOD_WITH_MPI=1" in shown(screen)
        with zipfile.ZipFile(wheel) as archive:
            assert "HOROVOD_WITHOUT_MPI" not in archive.read("horovod_options").decode()
        plain = cache_folder(None, environ) / "horovod" / recipe_for_here(environ).key
        assert cached_wheel(plain) is None

    def test_failure(self, environ, source):
        source(**{"horovod/tensorflow/mpi_ops.cc": "int one() { return two; }\n"})
        ended = command(environ)
        out, err = ended.communicate(timeout=LIMIT_S)
        assert ended.returncode == 1
        assert out == ""
        assert "Error: Building Horovod must end with exit status 0." in err
        assert "  | horovod/tensorflow/mpi_ops.cc:1:" in err
        assert "Traceback" not in err
        assert cached(environ) == ["failure.log"]

    def test_no_source(self, environ):
        with pytest.raises(BuildError) as raised:
            horovod_build.build(environ=environ)
        assert "  | ERROR: Could not find a version" in str(raised.value)
        assert "pip must reach its package index" in str(raised.value)

    def test_two_at_once(self, environ, source):
        source()
        both = [command(environ, "--no-install") for _ in range(2)]
        for one in both:
            out, err = one.communicate(timeout=LIMIT_S)
            assert one.returncode == 0, err
            assert cached_wheel(Path(out.strip()).parent) == Path(out.strip())
        assert len(cached(environ)) == 1

    @pytest.mark.parametrize(
        ("number", "status"),
        [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.full)],
    )
    def test_interrupted(self, environ, source, tmp_path, number, status):
        source()
        file = tmp_path / "pid"
        temporary = tmp_path / "tmp"
        temporary.mkdir()
        own = environ | {"PID_FILE": str(file), "TMPDIR": str(temporary)}
        running = command(own, "--no-install")
        deadline = time.monotonic() + LIMIT_S
        while not (file.exists() and file.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        running.send_signal(number)
        _, err = running.communicate(timeout=LIMIT_S)
        assert running.returncode == status
        assert "Traceback" not in err
        assert is_gone(int(file.read_text()))
        assert cached(environ) == []
        assert list(temporary.iterdir()) == []


def test_install_replaces_the_same_version(environ, tmp_path):
    venv.create(tmp_path / "venv", symlinks=True)
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    for name in ("tfdist", "pip", "click", "rich", "pygments", "markdown_it", "mdurl"):
        (libraries / name).symlink_to(Path(find_spec(name).origin).parent)
    tiny_wheel(Path(environ["PIP_FIND_LINKS"]), "required")
    code = (
        "import sys; from pathlib import Path\n"
        "from tfdist.launch.horovod_wheel.build import install\n"
        "install(Path(sys.argv[1]))"
    )
    for module in ("first", "second"):
        wheel = tiny_wheel(tmp_path / module, module=module, needs="Requires-Dist: required\n")
        subprocess.run(
            [tmp_path / "venv" / "bin" / "python", "-c", code, wheel],
            env=environ | {"PYTHONPATH": str(libraries)},
            timeout=LIMIT_S,
            check=True,
        )
    (installed,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    assert (installed / "horovod" / "second.py").exists()
    assert not (installed / "horovod" / "first.py").exists()
    assert (installed / "required" / "one.py").exists()


@quick
def test_command_line(monkeypatch, tmp_path):
    calls: list[tuple] = []
    wheel = tmp_path / "horovod.whl"

    def build(**options):
        calls.append(("build", options))
        return wheel

    monkeypatch.setattr(horovod_build, "build", build)
    monkeypatch.setattr(horovod_build, "install", lambda *a: calls.append(("install", *a)))
    monkeypatch.setattr(horovod_build, "check", lambda **k: calls.append(("check",)))

    def invoke(*options: str):
        calls.clear()
        return CliRunner().invoke(cli.main, ["horovod", "build", *options])

    assert invoke().exit_code == 0
    default = {"cache_dir": None, "force": False, "jobs": None}
    assert calls == [("build", default), ("install", wheel), ("check",)]
    result = invoke("--no-install", "--force", "--jobs", "3", "--cache-dir", str(tmp_path))
    assert calls == [("build", {"cache_dir": tmp_path, "force": True, "jobs": 3})]
    assert result.output == f"{wheel}\n"
    assert invoke("--jobs", "0").exit_code == 2
    for arguments in (["horovod"], ["horovod", "build"]):
        help_text = CliRunner().invoke(cli.main, [*arguments, "--help"])
        assert help_text.exit_code == 0
        assert "Example" in help_text.output


@pytest.mark.cluster
class TestCheck:
    @pytest.mark.full  # the place horovod-2
    def test_two_processes(self, screen, tmp_path):
        if find_spec("horovod") is None:
            pytest.skip("Horovod is not installed: `tfdist horovod build`")
        horovod_build.check(console=screen, log_folder=tmp_path)
        assert "two processes summed 1 + 2 = 3 over Gloo" in shown(screen)

    def test_what_cannot_be_imported(self, screen, tmp_path):
        """An empty package in front of Horovod's own, if there is one."""
        broken = tmp_path / "horovod"
        broken.mkdir()
        (broken / "__init__.py").write_text("raise ImportError('libmpi.so: cannot open')\n")
        own = {**os.environ, "PYTHONPATH": str(tmp_path)}
        with pytest.raises(
            BuildError, match=r"Importing Horovod(.|\n)*libmpi\.so: cannot open"
        ):
            horovod_build.check(environ=own, console=screen)
