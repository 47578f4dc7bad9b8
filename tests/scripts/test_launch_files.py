"""Every file of training/launch is what its launcher takes, and a run through them trains."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent.parent / "training"))
import systems

ROOT = Path(__file__).parent.parent.parent
LAUNCH = ROOT / "training" / "launch"
ACCELERATE = sorted(path for path in LAUNCH.glob("*.yaml") if path.name != "kubernetes.yaml")
SHELL = sorted(LAUNCH.glob("*.sh"))


def header(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


def environment(**changes: str) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        **changes,
    }


def test_all_files_are_known() -> None:
    assert {path.name for path in LAUNCH.iterdir()} == {
        *(path.name for path in [*ACCELERATE, *SHELL]),
        "kubernetes.yaml",
    }
    assert len(ACCELERATE) == 3
    assert len(SHELL) == 2


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.name)
def test_accelerate_reads_the_file_and_its_header_names_it(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    found = load_config_from_file(str(path))
    assert found.num_machines == 1
    assert f"accelerate launch --config_file training/launch/{path.name} training/pretrain.py CONFIG" in header(path)
    # What a key means is checked by accelerate's launcher: it has an option of each name.
    from accelerate.commands.launch import launch_command_parser

    options = {word for action in launch_command_parser()._actions for word in action.option_strings}
    for section in (found.fsdp_config, found.deepspeed_config):
        for key in section:
            assert {f"--{key}", f"--{key.removeprefix('deepspeed_')}"} & options, key


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_the_shell_reads_the_script(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert os.access(path, os.X_OK)
    assert f"training/launch/{path.name} training/pretrain.py CONFIG" in header(path)


def test_a_script_without_what_it_needs_says_so(tmp_path: Path) -> None:
    script = LAUNCH / "torchrun.sh"
    missing = {key: value for key, value in environment().items() if key not in ("HEAD", "NODES")}
    done = subprocess.run([script, "x.py"], env=missing, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "HEAD" in done.stderr
    wrong = {**missing, "HEAD": "a:1", "NODES": "1", "SHARDING": "zero"}
    done = subprocess.run([script, "x.py"], env=wrong, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "expected fsdp2 or ddp" in done.stderr


def test_the_manifest_names_what_the_scripts_take() -> None:
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text(encoding="utf-8"))
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    spec, template = job["spec"], job["spec"]["template"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"]
    (container,) = template["spec"]["containers"]
    told = {entry["name"]: entry["value"] for entry in container["env"]}
    assert int(told["NODES"]) == spec["parallelism"]
    assert int(told["GPUS"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    # The pod with index 0 is found by the name that job and service give it.
    assert (
        told["HEAD"]
        == f"{job['metadata']['name']}-0.{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    )
    assert template["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    script = (LAUNCH / "torchrun.sh").read_text(encoding="utf-8")
    assert all(re.search(rf"\b{name}\b", script) for name in told)
    assert all((ROOT / word).is_file() for word in container["command"][:2])
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in template["spec"]["volumes"]}


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_processes_train_through_the_file(tmp_path: Path, name: str) -> None:
    config = systems.write_config(tmp_path, systems.stage(epochs=1))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH / f"{name}.yaml")]
    command += ["--num_processes", "2", "--main_process_port", "0", str(ROOT / "training" / "pretrain.py"), str(config)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 process(es), cpu" in (tmp_path / "run" / "run.md").read_text(encoding="utf-8")
    assert [row["step"] for row in systems.rows(tmp_path)] == [1, 2, 3, 4, 5]
    assert (tmp_path / "run" / "final" / "manifest.json").is_file()


def test_two_nodes_meet_and_train(tmp_path: Path) -> None:
    """Two nodes with a process each, both on this machine."""
    config = systems.write_config(tmp_path, systems.stage(epochs=1))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        head = f"127.0.0.1:{free.getsockname()[1]}"
    told = environment(HEAD=head, NODES="2", GPUS="1", SHARDING="fsdp2")
    command = [str(LAUNCH / "torchrun.sh"), str(ROOT / "training" / "pretrain.py"), str(config), "--resume"]
    nodes = [
        subprocess.Popen(command, env=told, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    for node in nodes:
        output, _ = node.communicate(timeout=600)
        assert node.returncode == 0, output
    assert "2 process(es), cpu" in (tmp_path / "run" / "run.md").read_text(encoding="utf-8")
    assert len(systems.rows(tmp_path)) == 5


def test_slurm_starts_the_script_on_every_node_and_requeues(tmp_path: Path) -> None:
    """With stand-ins for Slurm's commands: what they are asked for, and what happens when the time is up."""
    tools = tmp_path / "bin"
    tools.mkdir()
    scripts = {
        "scontrol": 'if [ "$1" = show ]; then printf "node-a\\nnode-b\\n"; else echo "$@" >> log; fi',
        "srun": 'trap "echo saved >> log; exit 143" TERM; echo "$HEAD $NODES $@" >> log; while true; do sleep 0.1; done',
    }
    for name, body in scripts.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tools / name).chmod(0o755)
    shutil.copytree(LAUNCH, tmp_path / "training" / "launch")
    slurm = {
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "7",
    }
    told = environment(**slurm)
    told["PATH"] = f"{tools}:{told['PATH']}"
    command = ["bash", "training/launch/slurm.sh", "training/pretrain.py", "a.yaml"]
    job = subprocess.Popen(command, cwd=tmp_path, env=told)
    log = tmp_path / "log"
    for _ in range(600):
        if log.is_file() and "node-a" in log.read_text():
            break
        try:
            job.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(f"ended with {job.returncode}")
    job.terminate()
    assert job.wait(60) == 143
    assert log.read_text().splitlines() == [
        "node-a:29500 2 --kill-on-bad-exit=1 training/launch/torchrun.sh training/pretrain.py a.yaml --resume",
        "saved",
        "requeue 7",
    ]
