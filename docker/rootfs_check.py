"""Run the steps of a Dockerfile without a Docker engine, then the server as the image would.

    sudo python docker/rootfs_check.py --torch-wheel torch-2.13.0+cpu-....whl

The base image is a minimal Debian made by debootstrap. RUN lines run in a chroot of it, COPY copies
what .dockerignore lets through, ENV, USER, VOLUME and ENTRYPOINT are obeyed. Then the server runs
in PID, mount and IPC namespaces of its own: the root mounted read-only, a fresh /tmp, /cache as the
only volume, as the image's user and once as an arbitrary one. It must turn healthy, complete a
prompt, pass the health check, write nothing outside its volume, and exit with 0 after SIGTERM.

Not checked: layers, a registry, the engine's default seccomp and cgroup limits, GPUs.
"""

import argparse
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from dockerfile import Instruction, assignments, exec_form, expand, parse

ROOT = Path(__file__).parents[1]
START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
ARBITRARY_UID = 1000660000  # as OpenShift gives them


class CheckFailed(Exception):
    """Something did not behave as the image promises."""


def main() -> int:
    """Build, run, report; return the exit code."""
    options = parse_arguments()
    if os.geteuid() != 0:
        say("FAILED: mounts and chroot need root")
        return 1
    work = Path(tempfile.mkdtemp(prefix="rootfs-", dir=options.work))
    try:
        image = build(options, work)
        for user in (image.user, f"{ARBITRARY_UID}:0"):
            check_server(image, user, work)
    except (CheckFailed, subprocess.CalledProcessError) as error:
        say(f"FAILED: {error}")
        return 1
    finally:
        if not options.keep:
            shutil.rmtree(work, ignore_errors=True)
    say("passed")
    return 0


def parse_arguments() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dockerfile", type=Path, default=ROOT / "docker" / "Dockerfile.cpu")
    parser.add_argument("--base", type=Path, help="a debootstrap folder to copy; default: make one")
    parser.add_argument("--torch-wheel", type=Path, help="stands in for the CPU index of torch")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--work", type=Path, help="where the folders lie; default: the system's")
    parser.add_argument("--keep", action="store_true", help="leave the folders there")
    return parser.parse_args()


class Image:
    """A folder that is being filled as a stage says, and what its instructions set."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.env = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        self.arguments: dict[str, str] = {}
        self.settings: dict[str, str] = {}
        self.workdir = "/"

    @property
    def user(self) -> str:
        """The USER, as uid:gid."""
        return self.settings["USER"]

    def values(self) -> dict[str, str]:
        """What variables stand for; the environment wins over build arguments."""
        return {**self.arguments, **self.env}

    def path(self, inside: str) -> Path:
        """Return where a path inside lies outside; relative ones are below the WORKDIR."""
        return self.root / os.path.normpath(os.path.join(self.workdir, inside)).lstrip("/")


def build(options: argparse.Namespace, work: Path) -> Image:
    """Run every stage; return the last one's image."""
    given = assignments(" ".join(options.build_arg))
    global_arguments, stages = parse(options.dockerfile)
    global_arguments.update((name, given[name]) for name in global_arguments.keys() & given.keys())
    base = options.base or make_base(work, expand(stages[0].base, global_arguments))
    if options.torch_wheel is not None:
        given.setdefault("TORCH_INDEX", "file:///torch-index")
    images: dict[str, Image] = {}
    for stage in stages:
        start_s = time.monotonic()
        root = work / f"stage-{stage.name}"
        subprocess.run(["cp", "--archive", "--reflink=auto", str(base), str(root)], check=True)
        image = images[stage.name] = Image(root)
        with build_mounts(image, options.torch_wheel):
            for instruction in stage.instructions:
                run_instruction(instruction, image, images, given)
        say(f"stage {stage.name}: {time.monotonic() - start_s:.0f} s, {size_mib(root)} MiB")
    last = images[stages[-1].name]
    for stage in stages[:-1]:
        shutil.rmtree(images[stage.name].root)
    return last


def make_base(work: Path, name: str) -> Path:
    """Make the Debian that the base image `debian:SUITE-slim` has."""
    suite = name.partition(":")[2].removesuffix("-slim")
    folder = work / "base"
    command = ["debootstrap", "--variant=minbase", suite, str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


@contextlib.contextmanager
def build_mounts(image: Image, torch_wheel: Path | None) -> Iterator[None]:
    """Lend the build what an engine lends it: name resolution, certificates, /proc; and torch."""
    files = ["/etc/resolv.conf"]
    saved: dict[Path, bytes | None] = {}
    for name in files:
        inside = image.path(name)
        saved[inside] = inside.read_bytes() if inside.is_file() else None
        shutil.copyfile(name, inside)
    bundle = Path("/etc/ssl/certs/ca-certificates.crt")
    lent = [image.path("/host-certificates"), image.path("/torch-index")]
    lent[0].mkdir()
    shutil.copyfile(bundle, lent[0] / "bundle.crt")
    if torch_wheel is not None:
        index = lent[1] / "torch"
        index.mkdir(parents=True)
        shutil.copyfile(torch_wheel, index / torch_wheel.name)
        (index / "index.html").write_text(f'<a href="{torch_wheel.name}">{torch_wheel.name}</a>')
    proc = image.path("/proc")
    subprocess.run(["mount", "--types", "proc", "proc", str(proc)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(proc)], check=True)
        for folder in lent:
            shutil.rmtree(folder, ignore_errors=True)
        for inside, content in saved.items():
            inside.unlink()
            if content is not None:
                inside.write_bytes(content)


def run_instruction(
    instruction: Instruction, image: Image, images: dict[str, Image], given: dict[str, str]
) -> None:
    """Carry out one instruction in `image`."""
    rest = instruction.rest
    match instruction.keyword:
        case "ARG":
            declared = assignments(rest)
            image.arguments.update({name: given.get(name, declared[name]) for name in declared})
        case "ENV":
            image.env.update(assignments(expand(rest, image.values())))
        case "WORKDIR":
            image.workdir = rest
            image.path(".").mkdir(parents=True, exist_ok=True)
        case "COPY":
            copy(rest, image, images)
        case "RUN":
            say(f"RUN {rest[:90]}")
            run_in(image, rest)
        case "LABEL" | "VOLUME" | "EXPOSE" | "USER" | "STOPSIGNAL":
            image.settings[instruction.keyword] = rest
        case "HEALTHCHECK" | "ENTRYPOINT" | "CMD":
            image.settings[instruction.keyword] = rest[rest.index("[") :]
        case other:
            raise CheckFailed(f"line {instruction.line}: {other} is not known here")


def run_in(image: Image, command: str) -> None:
    """Run a RUN line as root in the folder."""
    # The two variables of the host's certificates are no part of the image.
    lent = "/host-certificates/bundle.crt"
    environment = {**image.arguments, **image.env, "PIP_CERT": lent, "SSL_CERT_FILE": lent}
    environment |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "DEBIAN_FRONTEND": "noninteractive"}
    shell = f"cd {image.workdir} && {command}"
    done = subprocess.run(
        ["chroot", str(image.root), "/bin/sh", "-c", shell],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise CheckFailed(f"RUN {command} ended with {done.returncode}:\n{done.stdout[-3000:]}")


def copy(rest: str, image: Image, images: dict[str, Image]) -> None:
    """Copy from the context, or from another stage."""
    words = rest.split()
    stage = words.pop(0).partition("=")[2] if words[0].startswith("--from=") else None
    *sources, target = words
    for source in sources:
        origin = ROOT / source if stage is None else images[stage].path(source)
        into_folder = target.endswith("/")
        destination = image.path(target) / origin.name if into_folder else image.path(target)
        destination.parent.mkdir(parents=True, exist_ok=True)
        if origin.is_dir():
            ignored = shutil.ignore_patterns(*ignored_names()) if stage is None else None
            shutil.copytree(origin, destination, symlinks=True, ignore=ignored, dirs_exist_ok=True)
        else:
            shutil.copy2(origin, destination)


def ignored_names() -> list[str]:
    """Return the patterns of .dockerignore that hold in every folder."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return [line.removeprefix("**/") for line in lines if line.startswith("**/")]


def check_server(image: Image, user: str, work: Path) -> None:
    """Start the server as `user` and check what the image promises. Raises CheckFailed."""
    say(f"as user {user}")
    volume = work / f"cache-{user.partition(':')[0]}"
    # A volume starts with the owner and mode that the folder has in the image.
    subprocess.run(["cp", "--archive", str(image.path("/cache")), str(volume)], check=True)
    port = free_port()
    image.env["NSA_SERVE_PORT"] = str(port)
    start_s = time.monotonic()
    with running(image, user, volume) as (process, init_pid):
        wait_healthy(process, port)
        say(f"healthy after {time.monotonic() - start_s:.1f} s")
        check_answers(port)
        check_health_command(image, init_pid, user)
        check_process(init_pid, user)
        os.kill(init_pid, signal.SIGTERM)
        stop_s = time.monotonic()
        code = process.wait(STOP_TIMEOUT_S)
        say(f"exit code {code} {time.monotonic() - stop_s:.1f} s after SIGTERM")
        if code != 0:
            raise CheckFailed(f"expected exit code 0 after SIGTERM, got {code}")


@contextlib.contextmanager
def running(image: Image, user: str, volume: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Start entrypoint and command; yield the process that waits for them and PID 1 inside."""
    command = exec_form(image.settings["ENTRYPOINT"]) + exec_form(image.settings["CMD"])
    root = str(image.root)
    mounts = [
        "mount --make-rprivate / 2>/dev/null || true",
        f"mount --bind {root} {root}",
        f"mount --bind {volume} {root}/cache",
        f"mount -t tmpfs -o mode=1777,size=512m tmpfs {root}/tmp",
        f"mount -t tmpfs -o mode=0755,size=1m tmpfs {root}/dev",
        f"mkdir -m 1777 {root}/dev/shm",
        *(
            f"touch {root}/dev/{name} && mount --bind /dev/{name} {root}/dev/{name}"
            for name in ("null", "zero", "random", "urandom")
        ),
        f"mount -t proc proc {root}/proc",
        f"mount -o remount,bind,ro {root}",
        # Whoever can write here can write the image.
        f"if touch {root}/written 2>/dev/null; then echo 'the root is writable' >&2; exit 97; fi",
        f'exec chroot --userspec={user} --groups="" {root} "$@"',
    ]
    launch = ["sh", "-ec", "\n".join(mounts), "sh", *command]
    process = subprocess.Popen(
        ["unshare", "--mount", "--pid", "--ipc", "--fork", "--kill-child", *launch],
        env=image.env,
    )
    try:
        yield process, child_of(process)
    finally:
        process.kill()
        process.wait()


def child_of(process: "subprocess.Popen[bytes]") -> int:
    """Return the process that is number 1 in the new namespace."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    for _ in range(100):
        if numbers := children.read_text().split():
            return int(numbers[0])
        time.sleep(0.1)
    raise CheckFailed("the server's process did not appear")


def wait_healthy(process: "subprocess.Popen[bytes]", port: int) -> None:
    """Wait for /ready; before, it must say 503 and /health/live 200."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            raise CheckFailed(f"the server ended with {process.returncode} while it started")
        with contextlib.suppress(OSError):
            status, _ = ask(port, "GET", "/ready")
            if status == 200:
                return
            live, _ = ask(port, "GET", "/health/live")
            if (status, live) != (503, 200):
                raise CheckFailed(f"while loading: /ready {status}, /health/live {live}")
        time.sleep(0.2)
    raise CheckFailed(f"not ready after {START_TIMEOUT_S:.0f} s")


def check_answers(port: int) -> None:
    """Ask for health, metrics and one completion."""
    for path in ("/health", "/metrics", "/v1/models"):
        status, _ = ask(port, "GET", path)
        if status != 200:
            raise CheckFailed(f"GET {path} answers {status}")
    body = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    status, answer = ask(port, "POST", "/v1/completions", body)
    if status != 200 or not answer["choices"][0]["text"].strip():
        raise CheckFailed(f"the completion answers {status}: {answer}")
    say(f"completion: {answer['choices'][0]['text']!r}")


def check_health_command(image: Image, init_pid: int, user: str) -> None:
    """Run HEALTHCHECK as the engine does: a new process in the container's namespaces."""
    command = exec_form(image.settings["HEALTHCHECK"])
    start_s = time.monotonic()
    enter = ["nsenter", f"--target={init_pid}", "--mount", "--pid", "--ipc"]
    inside = ["chroot", f"--userspec={user}", "--groups=", str(image.root), *command]
    done = subprocess.run([*enter, *inside], env=image.env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise CheckFailed(f"the health check ended with {done.returncode}")
    say(f"health check: {done.stdout.strip()} in {time.monotonic() - start_s:.2f} s")


def check_process(init_pid: int, user: str) -> None:
    """Check PID 1's name, and that it runs as the user with the group 0."""
    status = Path(f"/proc/{init_pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    uid, gid = fields["Uid"].split()[0], fields["Gid"].split()[0]
    if (fields["Name"], f"{uid}:{gid}") != ("tini", user):
        raise CheckFailed(f"process 1 is {fields['Name']} as {uid}:{gid}, expected tini as {user}")


def ask(port: int, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    """Send one request; return the status and the JSON, or text where it is none."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        content = None if body is None else json.dumps(body)
        connection.request(method, path, content, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
    finally:
        connection.close()
    is_json = response.headers.get_content_type() == "application/json"
    return response.status, json.loads(text) if is_json else text


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def size_mib(folder: Path) -> int:
    """Return the size on disk."""
    done = subprocess.run(
        ["du", "--summarize", "--one-file-system", "--block-size=1M", str(folder)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return int(done.stdout.split()[0])


def say(text: str) -> None:
    """Print one line of the report."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
