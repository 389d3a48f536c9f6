"""The launcher: which process is which, and its report on every way in which a process can end."""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import yaml

from razor_jax.cli import app as cli
from razor_jax.launch import __main__ as launch
from razor_jax.launch import worker

FLAGS = {"coordinator": None, "processes": None, "process_id": None, "connect_timeout": 300, "heartbeat": 20}
LWS = {"LWS_LEADER_ADDRESS": "razor-0.razor.default", "LWS_GROUP_SIZE": "4", "LWS_WORKER_INDEX": "3"}
JAX_NAMES = {"JAX_COORDINATOR_ADDRESS": "host:9", "JAX_NUM_PROCESSES": "2"}


def process_info(env, **flags):
    found = launch.process_info(argparse.Namespace(**(FLAGS | flags)), env)
    return found.coordinator, found.processes, found.process


def test_flags_come_before_the_environment():
    given = {"coordinator": "a:1", "processes": 3, "process_id": 0}
    assert process_info(JAX_NAMES | LWS | {"JAX_PROCESS_ID": "1"}, **given) == ("a:1", 3, 0)
    assert process_info(JAX_NAMES | LWS | {"JAX_PROCESS_ID": "1"}) == ("host:9", 2, 1)
    assert process_info(JAX_NAMES | {"JOB_COMPLETION_INDEX": "1"}) == ("host:9", 2, 1)
    assert process_info(LWS) == (f"razor-0.razor.default:{launch.PORT}", 4, 3)
    assert process_info({}, coordinator="a", processes=2, process_id=1) == (f"a:{launch.PORT}", 2, 1)
    # JAX detects the rest: TPU VMs, Slurm, a Job without a coordinator address.
    assert process_info({}) == process_info({"JOB_COMPLETION_INDEX": "1"}) == (None, None, None)


def test_a_wrong_place_is_named():
    with pytest.raises(ValueError, match="process 4 of 4: ids go from 0 to 3"):
        process_info(LWS | {"LWS_WORKER_INDEX": "4"})
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES='two': must be a whole number"):
        process_info(JAX_NAMES | {"JAX_NUM_PROCESSES": "two"})


@pytest.mark.parametrize(
    "flags", [[], ["--"], ["--", "-m"], ["--processes", "0", "--", "a.py"], ["--restarts", "-1"], ["--grace", "-1"]]
)
def test_wrong_usage(flags, capsys):
    with pytest.raises(SystemExit) as end:
        launch.main(flags)
    assert end.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_tell_without_a_launcher_does_nothing():
    worker.notify_launcher(finished="q1")


SCRIPT = """
import os, sys, time
from razor_jax.launch.worker import notify_launcher
notify_launcher(finished="q7")
print(os.getpid(), *sys.argv[1:], flush=True)
if sys.argv[1] == "wait":
    time.sleep(60)
elif sys.argv[1] == "raise":
    raise RuntimeError("a bug")
elif sys.argv[1] == "abort":
    os.abort()
elif sys.argv[1] == "too large":
    import jax
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\\nallocations")
elif sys.argv[1] == "fail once":
    first = not os.path.exists(sys.argv[2])
    open(sys.argv[2], "w").close()
    os._exit(75 if first else 0)
elif sys.argv[1].isdecimal():
    sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def start(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    started = []

    def start(*arguments, flags=("--processes", "1")):
        command = [sys.executable, "-m", "razor_jax.launch", *flags, "--", str(tmp_path / "script.py"), *arguments]
        env = os.environ | {"JAX_PLATFORMS": "cpu"}
        launcher = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(launcher)
        return launcher

    yield start
    for launcher in started:
        launcher.kill()
        launcher.communicate()


def test_how_a_script_ends_is_one_line_and_a_code(start):
    runs = {name: start(name) for name in ("0", "2", "raise", "abort", "too large")}
    ends = {name: (run.communicate(timeout=120), run.returncode) for name, run in runs.items()}
    last = {name: (err.splitlines() or [""])[-1] for name, ((_, err), _) in ends.items()}
    assert [code for _, code in ends.values()] == [0, 2, worker.LOST, worker.LOST, 1]
    assert last["0"] == ""
    who = "razor-jax: process ? of 1 on "
    assert all(line.startswith(who) and line.endswith("last finished prompt: q7") for line in last.values() if line)
    assert "ended: exit code 2;" in last["2"]
    assert "ended: RuntimeError: a bug;" in last["raise"]
    assert "ended: killed by SIGABRT;" in last["abort"]
    assert "ended: RESOURCE_EXHAUSTED: out of memory;" in last["too large"]
    assert "Traceback" in ends["raise"][0][1]


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.", 1),
        ("INVALID_ARGUMENT: Executable expected 2 buffers", 1),
        ("UNAVAILABLE: Socket closed", worker.LOST),
        ("INTERNAL: Gloo all-reduce failed", worker.LOST),
    ],
)
def test_errors_of_jax_that_another_start_would_meet_again_are_verdicts(said, code):
    assert worker.exit_code(jax.errors.JaxRuntimeError(said)) == code


def test_a_worker_ends_with_its_launcher(start):
    asked, killed = start("wait"), start("wait")
    children = [int(run.stdout.readline().split()[0]) for run in (asked, killed)]
    asked.send_signal(signal.SIGTERM)
    killed.kill()
    _, err = asked.communicate(timeout=30)
    assert asked.returncode == worker.LOST
    assert "ended: stopped by SIGTERM; last finished prompt: q7" in err
    deadline = time.monotonic() + 20
    while any(alive(child) for child in children):
        assert time.monotonic() < deadline, "a worker outlives its launcher"
        time.sleep(0.1)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def test_a_lost_start_is_made_again(start, tmp_path):
    run = start("fail once", str(tmp_path / "mark"), flags=("--processes", "1", "--restarts", "1", "--heartbeat", "2"))
    _, err = run.communicate(timeout=120)
    assert run.returncode == 0
    assert "start 2 of 2 in 7 s" in err


def test_a_launcher_between_two_starts_ends_when_asked(start):
    run = start("75", flags=("--processes", "1", "--restarts", "1"))
    assert any("start 2 of 2 in 25 s" in line for line in run.stderr)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=5) == worker.LOST


def test_a_launcher_that_stays_ends_when_asked(start):
    run = start("2", flags=("--processes", "1", "--stay"))
    assert "ended: exit code 2;" in run.stderr.readline()
    with pytest.raises(subprocess.TimeoutExpired):
        run.wait(timeout=1)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=5) == 2


def test_a_coordinator_out_of_reach_is_named(start):
    given = ("--coordinator", "localhost:1", "--processes", "2", "--process-id", "1", "--connect-timeout", "3")
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}
    os.environ.update(slurm | {"SLURM_LOCALID": "0"})
    try:
        detected = start("0", flags=("--connect-timeout", "3"))
    finally:
        for name in (*slurm, "SLURM_LOCALID"):
            del os.environ[name]
    for run, address in ((start("0", flags=given), "localhost:1"), (detected, "localhost:61447")):
        _, err = run.communicate(timeout=120)
        assert run.returncode == worker.LOST
        assert f"not all processes connected to {address} within 3 s" in err
        assert "stack trace" not in err


def test_nothing_to_detect_is_wrong_usage(start):
    run = start("0", flags=())
    _, err = run.communicate(timeout=120)
    assert run.returncode == 1
    assert "Give --coordinator HOST:PORT" in err


@pytest.mark.parametrize(
    ("spoken", "said"),
    [
        ("unhealthy (stopped sending heartbeats):\n1\n3\nThe tasks have", "process 1, 3 is dead or unreachable"),
        ("Failed to send RPC to coordination service. Either", "process 0, the coordinator, is dead or unreachable"),
        ("client.h:80] absl::Status: INTERNAL: other\nmore", "INTERNAL: other"),
        ("", "killed by SIGABRT"),
    ],
)
def test_last_words_of_jax_are_told_in_short(spoken, said):
    assert launch.explain(-signal.SIGABRT, {}, spoken, 300) == said


SCRIPTS = Path(__file__).parents[2] / "scripts"


def documents(name):
    return {document["kind"]: document for document in yaml.safe_load_all((SCRIPTS / "k8s" / name).read_text())}


def container(pod):
    (only,) = pod["containers"]
    return only


@pytest.mark.parametrize("name", ["job.yaml", "job-tpu.yaml"])
def test_a_job_names_every_pod_and_starts_lost_ones_again(name):
    service, job = documents(name)["Service"], documents(name)["Job"]["spec"]
    pod = job["template"]["spec"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"job-name": documents(name)["Job"]["metadata"]["name"]}
    assert (job["completionMode"], pod["restartPolicy"]) == ("Indexed", "Never")
    assert job["completions"] == job["parallelism"]
    _, count, fail = job["podFailurePolicy"]["rules"]
    assert count["action"] == "Count"
    assert worker.LOST in count["onExitCodes"]["values"] == fail["onExitCodes"]["values"]
    assert (fail["action"], fail["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
    assert {rule["onExitCodes"]["containerName"] for rule in (count, fail)} == {container(pod)["name"]}


def test_a_job_tells_the_launcher_what_it_reads():
    job = documents("job.yaml")["Job"]
    pod = job["spec"]["template"]["spec"]
    env = {entry["name"]: entry["value"] for entry in container(pod)["env"]}
    count = job["spec"]["completions"]
    # Kubernetes sets the index; pods of a Job are named after the Job and their index.
    found = process_info(env | {"JOB_COMPLETION_INDEX": "1"})
    assert found == (f"{job['metadata']['name']}-0.{pod['subdomain']}:{launch.PORT}", count, 1)
    # On TPUs, JAX detects the process id, and the Job's index must not override it.
    assert "env" not in container(documents("job-tpu.yaml")["Job"]["spec"]["template"]["spec"])


@pytest.mark.parametrize("name", ["job-tpu.yaml", "leaderworkerset.yaml", "leaderworkerset-http.yaml"])
def test_tpu_pods_fill_their_slice(name):
    if name != "job-tpu.yaml":
        template = documents(name)["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
        pods, pod = template["size"], template["workerTemplate"]["spec"]
        assert template["restartPolicy"] == "RecreateGroupOnPodRestart"
    else:
        job = documents(name)["Job"]["spec"]
        pods, pod = job["completions"], job["template"]["spec"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    resources = container(pod)["resources"]
    assert resources["requests"] == resources["limits"] == {"google.com/tpu": rows * columns // pods}
    line = " ".join([*container(pod)["command"], *container(pod)["args"]])
    assert f"--mesh=data=1,model={rows * columns}" in line


def test_the_leader_of_a_server_runs_what_its_workers_run_and_has_time_to_drain():
    found = documents("leaderworkerset-http.yaml")
    template = found["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    leader, other = (template[name]["spec"] for name in ("leaderTemplate", "workerTemplate"))
    for name in ("image", "workingDir", "command", "args", "env", "resources", "volumeMounts"):
        assert container(leader)[name] == container(other)[name]
    assert leader["nodeSelector"] == other["nodeSelector"]
    line = [*container(leader)["command"], *container(leader)["args"]]
    port, drain = (int(next(word for word in line if name in word).split("=")[1]) for name in ("--port", "--drain"))
    grace = launch._parse(line[3:]).grace
    assert leader["terminationGracePeriodSeconds"] == other["terminationGracePeriodSeconds"] > grace > drain
    assert {container(leader)[probe]["httpGet"]["path"] for probe in ("readinessProbe", "livenessProbe")} == {
        "/ready",
        "/health",
    }
    assert {container(leader)[probe]["httpGet"]["port"] for probe in ("readinessProbe", "livenessProbe")} == {port}
    labels = template["leaderTemplate"]["metadata"]["labels"]
    assert found["Service"]["spec"]["selector"].items() <= labels.items()
    assert "metadata" not in template["workerTemplate"]  # the service must not find it


@pytest.mark.parametrize("name", ["job.yaml", "job-tpu.yaml", "leaderworkerset.yaml", "leaderworkerset-http.yaml"])
def test_commands_in_manifests_are_understood(name):
    (spec,) = (d["spec"] for kind, d in documents(name).items() if kind != "Service")
    template = spec.get("template") or spec["leaderWorkerTemplate"]["workerTemplate"]
    only = container(template["spec"])
    words = [*only["command"], *only["args"]]
    assert words[:3] == ["python", "-m", "razor_jax.launch"]
    flags = launch._parse(words[3:])
    # A set restarts every pod that ends, for any exit code.
    assert flags.stay == (name == "leaderworkerset.yaml")
    assert (SCRIPTS.parent / flags.command[0]).is_file()
    with pytest.raises(SystemExit, match="0"):
        cli.app(["serve", *flags.command[1:], "--help"])
