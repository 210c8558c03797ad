"""``step3-hetero up``: roles that stay, a file to reach them by, logs that cost no role."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from afd.leaks import marked

from step3_hetero import SamplingParams, load
from step3_hetero.afd.loglines import MOST_WAITING, LogFiles, LogLines, to_all
from step3_hetero.errors import ConfigError, RequestError

pytest.importorskip("torch")
pytestmark = [
    pytest.mark.xdist_group("processes"),
    pytest.mark.processes,
    pytest.mark.usefixtures("no_leaks"),
]

PARAMS = SamplingParams(max_tokens=16, ignore_eos=True)


def tokens(config, **options):
    with load(config, **options) as engine:
        return engine.generate([21, 22, 23], PARAMS).token_ids


def states(up, role):
    return [f["state"] for f in up.facts() if f["event"] == "role" and f["role"] == role]


def wait_for(condition, deadline_s=90.0):
    until = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_roles_stand_serve_two_fronts_return_when_killed_and_leave_nothing(
    command, write_config, tmp_path
):
    config, attach, logs = write_config(), tmp_path / "roles.json", tmp_path / "logs"
    up = command("up", config, "--json", "--attach", attach, "--log-dir", logs)
    up.says('"event": "up"')
    undisturbed = tokens(config, attach=attach)
    assert tokens(config, attach=attach) == undisturbed
    wait_for(lambda: states(up, "f:0").count("serving") == 2)

    pid = next(f["pid"] for f in up.facts() if f["event"] == "up" for f in f["roles"][1:])
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: states(up, "f:0")[-1] == "ready" and "ended" in states(up, "f:0"))
    last = [f for f in up.facts() if f["event"] == "role" and f["role"] == "f:0"][-1]
    assert last["restarts"] == 1 and last["pid"] != pid
    assert tokens(config, attach=attach) == undisturbed  # at the address that the file has

    up.popen.send_signal(signal.SIGTERM)
    assert up.ends() == 0
    assert [f["said"] for f in up.facts()[-4:] if f["state"] == "ended"] == ["with exit code 0"] * 2
    assert not attach.exists()


def test_a_set_of_ranks_stands_and_is_attached_to(command, write_config, tmp_path):
    config, attach = write_config(roles__f__tp=2), tmp_path / "roles.json"
    up = command("up", config, "--json", "--attach", attach)
    up.says('"event": "up"')
    where = json.loads(attach.read_text())["roles"]
    assert {role: len(set(addresses)) for role, addresses in where.items()} == {"a": 1, "f": 2}
    attached = tokens(config, attach=attach)
    assert attached == tokens(config)
    for name in ("a:0", "f:0", "f:1"):
        wait_for(lambda name=name: states(up, name).count("serving") == 1)
    with load(config, attach=attach) as engine:
        engine.generate([21, 22, 23], PARAMS)
        paces = {m.member: m.calls for m in engine.executor.paces.rows() if m.stage == "ffn"}
    assert paces["f:0"] == paces["f:1"] > 0
    up.popen.send_signal(signal.SIGTERM)
    assert up.ends() == 0


def test_piped_it_prints_one_table_and_a_line_for_each_change(command, write_config):
    up = command("up", write_config())
    up.says("2 roles stand; Ctrl-C ends them")
    for text in ("role", "state", "restarts", "a:0 loading", "f:0 ready"):
        up.says(text)
    up.popen.send_signal(signal.SIGINT)
    assert up.ends() == 0


@pytest.mark.parametrize("name", ["up", "generate"])
def test_nothing_outlives_a_front_that_is_killed(command, write_config, no_leaks, name):
    """The roles hang on the front's life by a pipe: nobody is there to end them."""
    config = write_config(roles__f__spares=1)
    endless = ("--prompt-ids", "21,22", "--max-tokens", "200000", "--ignore-eos")
    one = command(name, config, *(endless if name == "generate" else ()))
    wait_for(lambda: len(marked(no_leaks.mark)) == 4)
    if name == "up":
        one.says("3 roles stand")
    one.popen.kill()
    one.popen.wait()
    wait_for(lambda: not marked(no_leaks.mark), 20)


def test_a_full_disk_for_logs_costs_no_role_and_no_token(command, write_config, tmp_path):
    config, attach, logs = write_config(), tmp_path / "roles.json", tmp_path / "logs"
    logs.mkdir()
    for name in ("a-0", "f-0"):
        (logs / f"{name}.log").symlink_to("/dev/full")
    noisy = {"PYTHONVERBOSE": "1", **os.environ}  # every role writes thousands of lines
    up = command("up", config, "--json", "--attach", attach, "--log-dir", logs, env=noisy)
    up.says('"event": "up"')
    assert tokens(config, attach=attach) == tokens(config)
    assert {s for s in states(up, "f:0")} <= {"starting", "loading", "ready", "serving"}
    up.popen.send_signal(signal.SIGTERM)
    assert up.ends() == 0


def test_a_config_for_one_process_has_no_roles_to_start(command, write_config):
    up = command("up", write_config(runtime__processes="one"))
    assert up.ends() == 2
    assert "runtime.processes: one has no roles to start; set it to per-role" in up.lines[-1]


def test_a_role_that_cannot_start_fails_the_start(command, write_config, tmp_path):
    config = write_config()
    text = config.read_text().replace("tiny-step3-digits", "none")
    (tmp_path / "bad.yaml").write_text(text)
    up = command("up", tmp_path / "bad.yaml")
    assert up.ends() == 2 and "none" in up.lines[-1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file: is step3-hetero up running"),
        ("{", "no file of step3-hetero up"),
        pytest.param("[" * 100_000, "no file of step3-hetero up", id="deep"),
        ('{"version": 2, "transport": "shm", "roles": {}}', "version 2 refused; expected 1"),
        ('{"version": 1, "transport": "tcp", "roles": {"a": ["x"], "f": ["y"]}}',
         "over tcp stand, the config has {'a': 1, 'f': 1} over shm"),
        ('{"version": 1, "transport": "shm", "roles": {"a": ["x"]}}', r"roles {'a': 1} over shm"),
    ],
)  # fmt: skip
def test_a_file_of_other_roles_is_refused(write_config, tmp_path, content, said):
    attach = tmp_path / "roles.json"
    if content is not None:
        attach.write_text(content)
    with pytest.raises(ConfigError, match=said):
        load(write_config(), attach=attach)


def pipe_of(text):
    reading, writing = os.pipe()
    threading.Thread(target=_fill, args=(writing, text), daemon=True).start()
    return os.fdopen(reading, "rb")


def _fill(writing, text):
    with os.fdopen(writing, "wb") as file:
        file.write(text)


def test_a_reader_that_takes_nothing_keeps_no_role_waiting():
    taken, go_on = [], threading.Event()

    def slow(name, line):
        go_on.wait(30)
        taken.append(line)

    lines = LogLines(slow)
    count = MOST_WAITING * 2
    followed = lines.follow("f:0", pipe_of(b"x\n" * count))
    followed.join(30)
    assert not followed.is_alive()  # all was read, though nothing was taken
    go_on.set()
    lines.close(30)
    notes = [line for line in taken if "lines were lost here" in line]
    assert taken[-1] in notes  # the pipe ended while none was taken: the gap is at the end
    lost = sum(int(note.split()[0].strip("(")) for note in notes)
    assert lost + len(taken) - len(notes) == count


def test_lines_that_a_disk_refuses_are_counted_and_the_next_is_tried():
    taken, full = [], [True] * 3

    def disk(name, line):
        if full and full.pop():
            raise OSError(28, "No space left on device")
        taken.append(line)

    lines = LogLines(disk)
    lines.follow("f:0", pipe_of(b"1\n2\n3\n4\n")).join(10)
    lines.close(10)
    assert taken == ["(3 lines were lost here)", "4"]


def test_a_limit_of_the_files_size_is_an_error_of_the_line_alone(tmp_path):
    """In a process of its own: the limit holds for all that it writes."""
    script = f"""
import resource
from step3_hetero.afd.loglines import LogFiles
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
files, refused = LogFiles(Path({str(tmp_path)!r})), 0
for _ in range(50):
    try:
        files("f:0", "0123456789")
    except OSError:
        refused += 1
print(refused)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(ran.stdout) > 30
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_one_sink_that_fails_keeps_no_line_from_the_other_and_is_told_of_its_gap():
    taken, late, full = [], [], [True] * 3

    def recovering(name, line):
        if full and full.pop():
            raise BrokenPipeError
        late.append(line)

    both = to_all(recovering, lambda name, line: taken.append(line))
    for line in "12345":
        both("f:0", line)
    assert taken == list("12345")
    assert late == ["(3 lines were lost here)", "4", "5"]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match=r"--log-dir .*: Not a directory; give another"):
        LogFiles(Path(tmp_path / "file" / "logs"))


def test_events_are_json(command, write_config):
    up = command("up", write_config(runtime__processes="one"), "--json")
    assert up.ends() == 2 and json.dumps(up.facts()) == "[]"
