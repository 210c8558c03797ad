"""The example manifests stay valid: files parse, and our command line takes their commands."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from click import Context

from step3_hetero.afd.local import slots
from step3_hetero.cli import cli
from step3_hetero.config import Config
from step3_hetero.runtime.resolving import resolve

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "manifests"


def commands(path):
    """Return the arguments of each of our commands in a file, comments too."""
    text = re.sub(r"^#\s*", "", path.read_text(), flags=re.MULTILINE)
    text = re.sub(r"\\\n\s*", " ", text)
    found = re.findall(r"step3-hetero ((?:role|up|generate|eval) .*?)(?: &| \.\.\.)?$", text,
                       flags=re.MULTILINE)  # fmt: skip
    return [[_filled(word) for word in shlex.split(line)] for line in found]


def _filled(word):
    """Return a word with what systemd, a shell or Slurm would fill in."""
    config = str(FOLDER / "config.yaml")
    for known in ("/etc/step3-hetero/config.yaml", "/config/config.yaml", "$config"):
        word = word.replace(known, config)
    word = word.replace("$((number + 1))", "1").replace("$number", "1").replace("%i", "1")
    word = re.sub(r"\$\{HOSTNAME[^}]*\}", "1", word)
    return re.sub(r"\$\{nodes\[(\d)\]\}", r"node\1", word)


FILES = sorted(p for p in FOLDER.iterdir() if p.name != "config.yaml")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_every_command_is_one_of_ours_with_options_that_exist(path):
    found = commands(path)
    assert found
    for name, *arguments in found:
        command = cli.get_command(Context(cli), name)
        if name == "eval":
            command = command.get_command(Context(command), arguments.pop(0))
        context = command.make_context(name, list(arguments))
        keys = context.params
        read = Config.read(keys["config"], keys["overrides"])
        if name == "role":
            here = [(m.role, m.number) for m in slots(read, resolve(read).placement)]
            assert (keys["name"], keys["number"]) in here


def test_a_command_with_an_option_that_is_not_there_would_be_found(tmp_path):
    (tmp_path / "x.service").write_text("ExecStart=step3-hetero role c.yaml --nmae f\n")
    ((name, *arguments),) = commands(tmp_path / "x.service")
    command = cli.get_command(Context(cli), name)
    with pytest.raises(Exception, match="nmae"):
        command.make_context(name, arguments)


def test_the_config_can_be_placed():
    config = Config.read(FOLDER / "config.yaml")
    assert [m.name for m in slots(config, resolve(config).placement)] == ["a:0", "f:0", "f:1"]


def test_kubernetes_objects_refer_to_each_other():
    documents = list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()))
    secret, service, workload = documents
    assert [d["kind"] for d in documents] == ["Secret", "Service", "StatefulSet"]
    pod = workload["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    (variable,) = container["env"]
    wanted = variable["valueFrom"]["secretKeyRef"]
    assert variable["name"] == "STEP3_HETERO_KEY"
    assert wanted["name"] == secret["metadata"]["name"] and wanted["key"] in secret["stringData"]
    assert service["spec"]["clusterIP"] == "None"
    assert workload["spec"]["serviceName"] == service["metadata"]["name"]
    labels = pod["metadata"]["labels"]
    assert service["spec"]["selector"] == workload["spec"]["selector"]["matchLabels"] == labels
    mounted = {m["name"] for m in container["volumeMounts"]}
    assert mounted == {v["name"] for v in pod["spec"]["volumes"]}
    assert {p["port"] for p in service["spec"]["ports"]} == {
        p["containerPort"] for p in container["ports"]
    }


def test_the_batch_script_is_one_that_bash_reads():
    script = FOLDER / "slurm.sbatch"
    ran = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert len(re.findall(r"^#SBATCH --", script.read_text(), flags=re.MULTILINE)) == 5


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
@pytest.mark.parametrize("name", ["step3-hetero-role@.service", "step3-hetero-up.service"])
def test_systemd_finds_nothing_to_say_of_the_units(tmp_path, name):
    unit = tmp_path / name.replace("@.", "@1.")
    shutil.copy(FOLDER / name, tmp_path / name)
    ran = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False
    )
    said = [line for line in ran.stderr.splitlines() if "step3-hetero" in line]
    assert (ran.returncode, said) == (0, [])
