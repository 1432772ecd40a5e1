"""Starting and ending servers: real process groups, small Python servers in place of vLLM."""

import os
import signal
import subprocess
import sys
import textwrap
import time
import urllib.error

import pytest

from layerskip_vllm.tools.server.process import HOST, Server, ServerError, find_free_port

# Answers every GET; starts a worker that ignores SIGTERM, and writes both process ids to a file.
FAKE_SERVER = """
import http.server, os, signal, subprocess, sys
pid_path, port = sys.argv[1], int(sys.argv[-1].partition("=")[2])
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
worker = subprocess.Popen([sys.executable, "-c", code])
with open(pid_path, "w") as file:
    file.write(f"{os.getpid()} {worker.pid}")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(404 if self.path == "/none" else 200)
        self.end_headers()
        self.wfile.write(self.path.encode())
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr("layerskip_vllm.tools.server.process._STOP_GRACE_S", 1)


@pytest.fixture
def make_server(tmp_path):
    def make(code, **arguments):
        script = tmp_path / "server.py"
        script.write_text(textwrap.dedent(code))
        command = [sys.executable, str(script), str(tmp_path / "pids")]
        return Server("fake", command, tmp_path / "log", **arguments)

    return make


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


def assert_all_end(pids):
    deadline_s = time.monotonic() + 10
    while any(map(is_running, pids)) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not [pid for pid in pids if is_running(pid)]


def read_pids(tmp_path):
    deadline_s = time.monotonic() + 120
    path = tmp_path / "pids"
    while not (path.exists() and len(path.read_text().split()) == 2):
        assert time.monotonic() < deadline_s, "the fake server did not start"
        time.sleep(0.05)
    return [int(pid) for pid in path.read_text().split()]


def test_server_answers_and_leaves_no_process_when_the_block_ends(make_server, tmp_path):
    with make_server(FAKE_SERVER) as server:
        pids = read_pids(tmp_path)
        assert all(map(is_running, pids))
        assert server.fetch("/metrics") == "/metrics"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            server.fetch("/none")
    assert_all_end(pids)


def test_server_leaves_no_process_when_the_block_raises(make_server, tmp_path):
    def interrupt():
        with make_server(FAKE_SERVER):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert_all_end(read_pids(tmp_path))


def test_server_raises_with_its_log_when_it_ends_early(make_server):
    server = make_server("import sys; sys.exit('no such model')")
    with pytest.raises(ServerError, match="no such model"):
        server.__enter__()


def test_server_is_killed_when_it_is_not_up_in_time(make_server, tmp_path, monkeypatch):
    code = FAKE_SERVER.replace("http.server.HTTPServer", "import time; time.sleep(600)\n#")
    server, pids = make_server(code, start_timeout_s=2), []
    start = server.start

    def start_and_look():  # before the time runs, however slow the machine
        start()
        pids.extend(read_pids(tmp_path))

    monkeypatch.setattr(server, "start", start_and_look)
    with pytest.raises(ServerError, match="was not up in 2 s"):
        server.__enter__()
    assert_all_end(pids)


def test_server_takes_another_port_when_its_own_was_taken(make_server, tmp_path):
    # Fails as vLLM does, once; the second start finds the file and serves.
    code = FAKE_SERVER.replace(
        "worker =",
        "seen = pid_path + '.seen'\n"
        "if not os.path.exists(seen):\n"
        "    open(seen, 'w').close()\n"
        "    sys.exit('OSError: [Errno 98] Address already in use')\n"
        "worker =",
    )
    with make_server(code) as server:
        assert server.fetch("/health") == "/health"
    assert (tmp_path / "pids.seen").exists()


def test_get_raises_with_the_log_when_the_server_is_gone(make_server, tmp_path):
    with make_server(FAKE_SERVER) as server:
        server_pid, worker_pid = read_pids(tmp_path)
        os.kill(server_pid, signal.SIGKILL)
        assert_all_end([server_pid])
        with pytest.raises(ServerError, match=r"has ended \(exit status -9\)"):
            server.fetch("/metrics")
    assert_all_end([worker_pid])


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_demo_process_leaves_no_process_when_it_is_signalled(make_server, tmp_path, signal_number):
    make_server(FAKE_SERVER)
    program = f"""
import signal, sys, time
from pathlib import Path
from benchmarks.serving import demo
from layerskip_vllm.tools.server import process as serving

# Whoever runs the tests in the background ignores these two, and so would this process.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
serving._STOP_GRACE_S = 1
def run(args, console):
    command = [sys.executable, {str(tmp_path / "server.py")!r}, {str(tmp_path / "pids")!r}]
    with serving.Server("fake", command, Path({str(tmp_path / "log")!r})):
        print("up", flush=True)
        time.sleep(600)

demo.run = run
sys.exit(demo.main([]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert process.stdout.readline() == b"up\n"
        pids = read_pids(tmp_path)
        process.send_signal(signal_number)
        assert process.wait(timeout=30) == 128 + signal_number
        assert_all_end(pids)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_free_port_can_be_bound():
    import socket

    with socket.socket() as probe:
        probe.bind((HOST, find_free_port()))
