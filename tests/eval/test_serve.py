"""The real server: streaming, readiness, metrics, its log as evidence of a rollout, and a process that is killed."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import httpx
import pytest
import yaml

from eval.release.load_release import load_release
from eval.signoff.keys import new_key, public_key, public_path
from eval.watch import chain, rollout
from eval.watch.routing import Plan, arm_of
from scripts.bench_server import free_port
from tests.eval.test_rollout import given
from tests.helpers import ROOT
from tests.helpers import run as command

PLAN = {"name": "served", "stages": [{"share": 0.5}], "measures": {"errors": {"worse_by": 0.1}}}


@contextmanager
def server(*words):
    """`eval.serve` as a process, and a client of it once it can answer."""
    port = free_port()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command_line = [sys.executable, "-m", "eval.serve", "--port", port, *words]
    with subprocess.Popen([*map(str, command_line)], cwd=ROOT, env=env) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=240) as client:
                wait_for(lambda: is_ready(client))
                yield client
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)


@pytest.fixture(scope="module")
def served(release, released_run, tmp_path_factory):
    """A server with a rollout that gives half of the keys to the release; one key starts it, another steps."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "plan.yaml").write_text(yaml.safe_dump(PLAN))
    key = released_run.folder / "key"
    (folder / "rollout").mkdir()
    words = ["--rollout", folder / "rollout", "--release", release, "--plan", folder / "plan.yaml"]
    rollout.start(
        folder / "rollout", *rollout.first_step(given("start", *words, "--by", "Ada", "--key", key))
    )
    new_key(ops := folder / "ops")
    words = ["--release", release, "--rollout", folder / "rollout", "--log", folder / "log.jsonl"]
    with server(*words, "--golden", 1, "--rollout-key", f"{key}.pub", f"{ops}.pub") as client:
        yield client, folder, ops


def wait_for(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "took too long"
        time.sleep(0.2)


def is_ready(client):
    try:
        return client.get("/healthz").status_code == 200
    except httpx.TransportError:
        return False


def key_of(arm):
    plan = Plan.model_validate(PLAN)
    return next(name for name in map(str, range(100)) if arm_of(plan, 1, name) == arm)


@pytest.mark.slow
def test_each_arm_answers_as_its_model_does_whole_and_in_pieces(served, release):
    client, folder, _ = served
    for arm in ("release", "fallback"):
        model, _ = load_release(release, "cpu", arm=arm)
        prompt = "def return self"
        expected = model.tokenizer.decode(model.generate(prompt, 6))
        body = {"prompt": prompt, "new_tokens": 6, "key": key_of(arm)}
        whole = client.post("/generate", json=body).json()
        assert (whole["text"], whole["arm"], whole["served_by"]) == (expected, arm, arm)
        with client.stream("POST", "/generate", json=body | {"stream": True}) as reply:
            lines = [json.loads(line) for line in reply.iter_lines()]
        assert len(lines) > 2
        assert "".join(line.get("text", "") for line in lines) == expected
        assert lines[-1]["served_by"] == arm
        score = client.post("/score", json={"text": prompt, "key": key_of(arm)}).json()
        assert score["bytes"] == len(prompt)
        assert score["bits"] > 1
    assert client.post("/generate", json={"prompt": "a " * 500}).status_code == 413
    assert client.post("/generate", json={"promt": "a"}).status_code == 422
    text = client.get("/metrics").text
    pattern = r'# TYPE \w+ \w+|\w+(\{(\w+="[^"]*",?)+\})? [-+.e\d]+'
    assert all(re.fullmatch(pattern, line) for line in text.splitlines())
    assert 'absorb_requests_total{arm="release",served_by="release",outcome="answered"} 3' in text
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert len(rows) == 6, "what was refused is no evidence"
    assert client.post("/reward", json={"id": score["id"], "reward": 2}).status_code == 422
    assert client.post("/reward", json={"id": score["id"], "reward": 0.5}).status_code == 200
    for again in (score["id"], "nobody"):
        assert client.post("/reward", json={"id": again, "reward": 0.5}).status_code == 404
    added = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()][6:]
    assert [(row["reward_of"], row["reward"]) for row in added] == [(rows[-1]["id"], 0.5)]


@pytest.mark.slow
def test_no_request_is_lost_when_the_release_is_killed_and_its_log_is_evidence(served):
    client, folder, key = served

    async def load():
        url, done = str(client.base_url), []
        async with httpx.AsyncClient(base_url=url, timeout=120) as many:

            async def one(number):
                await asyncio.sleep(0.02 * number)
                body = {"prompt": "the river", "new_tokens": 20, "key": f"k{number}"}
                reply = await many.post("/generate", json=body)
                done.append((reply.status_code, reply.json()))

            async def kill():
                await asyncio.sleep(0.5)
                child = (await many.get("/healthz")).json()["children"]["release"]
                os.kill(child["pid"], signal.SIGKILL)

            await asyncio.gather(kill(), *(one(number) for number in range(60)))
        return done

    answers = asyncio.run(load())
    assert [status for status, _ in answers] == [200] * 60
    over = [body for _, body in answers if body["arm"] == "release" and body["served_by"] == "fallback"]
    assert over, "some were dealt to the release while it was dead"
    assert all(body["text"] for _, body in answers)
    wait_for(lambda: client.get("/healthz").json()["children"]["release"]["ready"])
    lines = (folder / "log.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "arm" in row]  # the others are rewards
    assert sum(row["error"] for row in rows) == len(over)
    words = ["--rollout", folder / "rollout", "--log", folder / "log.jsonl", "--by", "cron", "--key", key]
    step = rollout.step(given("step", *words))
    assert step.sums["release"].errors == len(over)
    assert step.sums["release"].requests + step.sums["fallback"].requests == len({row["key"] for row in rows})


@pytest.mark.slow
def test_nobody_works_for_a_client_that_has_left(served):
    """The release's process is held, so that the client leaves before an answer in one piece is there."""
    client, folder, _ = served
    body = {"prompt": "the river", "new_tokens": 4, "key": key_of("release"), "tenant": "gone"}
    child = client.get("/healthz").json()["children"]["release"]["pid"]
    os.kill(child, signal.SIGSTOP)
    try:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/generate", json=body, timeout=1)

        def rows():
            lines = (folder / "log.jsonl").read_text().splitlines()
            return [row for row in map(json.loads, lines) if row.get("tenant") == "gone"]

        wait_for(rows, 20)
        assert [(row["error"], row["why"]) for row in rows()] == [
            (True, "the client gave up, or the server ended")
        ]
        assert "absorb_in_flight 0" in client.get("/metrics").text
    finally:
        os.kill(child, signal.SIGCONT)
    assert client.post("/generate", json=body).status_code == 200


@pytest.mark.slow
def test_a_rollout_that_goes_back_is_obeyed_at_once(served):
    client, folder, key = served
    body = {"prompt": "the river", "new_tokens": 2, "key": key_of("release")}
    assert client.post("/generate", json=body).json()["served_by"] == "release"
    words = ["--rollout", folder / "rollout", "--roll-back", "a user", "--by", "Bo", "--key", key]
    done = command("-m", "eval.watch.rollout", "step", *words)
    assert done.returncode == 1, done.stderr
    wait_for(lambda: "rolled back" in client.get("/healthz").json()["status"], 10)
    assert client.post("/generate", json=body).json()["served_by"] == "fallback"
    assert chain.read_steps(folder / "rollout", None)[-1].reason == "a user"


@pytest.mark.slow
def test_a_server_and_a_loader_say_which_key_they_do_not_know(served, release, released_run):
    """The last step is by another key than the start: with the starter's alone nobody may obey it."""
    _, folder, key = served
    first = f"{released_run.folder / 'key'}.pub"
    unknown = f"log.jsonl was signed with the unknown key {public_key(public_path(key)).keyid[:12]}"
    steps = chain.read_steps(folder / "rollout", None)
    assert steps[0].public_key != steps[-1].public_key, "a step was taken by a test before"
    words = ["--release", release, "--rollout", folder / "rollout", "--rollout-key", first]
    with server(*words) as client:
        answer = client.get("/healthz")
        assert answer.json()["status"].startswith(f"release is off: {unknown}")
        body = {"prompt": "the river", "new_tokens": 2, "key": key_of("release")}
        assert client.post("/generate", json=body).json()["served_by"] == "fallback"
    for keys, reason in ((first, unknown), ([first, public_path(key)], "the rollout was rolled back")):
        _, info = load_release(release, "cpu", rollout=folder / "rollout", rollout_key=keys)
        assert info.reason.startswith(reason)


@pytest.mark.slow
def test_a_client_that_gives_up_is_in_the_log(served):
    client, folder, _ = served
    body = {"prompt": "the river", "new_tokens": 40, "key": key_of("release"), "tenant": "left"}
    with client.stream("POST", "/generate", json=body | {"stream": True}) as reply:
        assert next(reply.iter_lines())

    def rows():
        lines = (folder / "log.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if row.get("tenant") == "left"]

    wait_for(rows, 20)
    assert [(row["arm"], row["error"], row["served_by"]) for row in rows()] == [("release", True, "")]


@pytest.mark.slow
def test_a_model_leaves_what_was_cancelled_and_answers_the_next(release):
    given = {"release": str(release), "target": "cpu", "public": None, "arm": "release"}
    asked = [
        {"id": 0, "prompt": "the river", "new_tokens": 50},
        {"cancel": 0},
        {"id": 1, "prompt": "the river", "new_tokens": 2},
        {"cancel": 1_000},  # of nobody yet
        {"id": 2, "prompt": "the river", "new_tokens": 2},
    ]
    with subprocess.Popen(
        [sys.executable, "-m", "eval.serve.worker", json.dumps(given)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as worker:  # fmt: skip
        out, _ = worker.communicate("".join(json.dumps(one) + "\n" for one in asked), timeout=240)
    said = [json.loads(line) for line in out.splitlines()][1:]
    assert [one["id"] for one in said if "done" in one] == [1, 2]
    assert len([one for one in said if one["id"] == 0]) < 50
