"""The real server: streaming, readiness, metrics, its log as evidence of a rollout, and a process that is killed."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time

import httpx
import pytest
import yaml
from fastapi import HTTPException

from eval.core.artifacts import file_sha256
from eval.release.load_release import load_release
from eval.serve.app import Generate, Log, Server
from eval.serve.children import Child
from eval.serve.router import Ask, Outcome, Router
from eval.signoff.keys import new_key, private_key
from eval.watch import chain, rollout
from eval.watch.routing import Plan, arm_of, now
from scripts.bench_server import free_port
from tests.eval.test_rollout import given
from tests.helpers import ROOT
from tests.helpers import run as command

PLAN = {"name": "served", "stages": [{"share": 0.5}], "measures": {"errors": {"worse_by": 0.1}}}


@pytest.fixture(scope="module")
def served(release, released_run, tmp_path_factory):
    """A server with a rollout that gives half of the keys to the release."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "plan.yaml").write_text(yaml.safe_dump(PLAN))
    key = released_run.folder / "key"
    (folder / "rollout").mkdir()
    words = ["--rollout", folder / "rollout", "--release", release, "--plan", folder / "plan.yaml"]
    rollout.start(
        folder / "rollout", *rollout.first_step(given("start", *words, "--by", "Ada", "--key", key))
    )
    port = free_port()
    words = ["--release", release, "--rollout", folder / "rollout", "--log", folder / "log.jsonl"]
    words += ["--port", port, "--golden", 1, "--rollout-key", f"{key}.pub"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "eval.serve", *map(str, words)], cwd=ROOT, env=env
    ) as process:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=240) as client:
            wait_for(lambda: is_ready(client))
            yield client, folder, key
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)


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
def test_a_rollout_that_goes_back_is_obeyed_at_once(served):
    client, folder, key = served
    body = {"prompt": "the river", "new_tokens": 2, "key": key_of("release")}
    assert client.post("/generate", json=body).json()["served_by"] == "release"
    words = ["--rollout", folder / "rollout", "--roll-back", "a user", "--by", "Bo", "--key", key]
    done = command("-m", "eval.watch.rollout", "step", *words)
    assert done.returncode == 1, done.stderr
    wait_for(lambda: "rolled back" in client.get("/healthz").json()["off"], 10)
    assert client.post("/generate", json=body).json()["served_by"] == "fallback"
    assert chain.read_steps(folder / "rollout", None)[-1].reason == "a user"


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


class Dying(Child):
    """A child that says two pieces and ends."""

    async def ask(self, request):
        from eval.serve.children import ChildDied

        for piece in ("a", "b"):
            yield {"piece": piece}
        raise ChildDied("gone")


class Steady(Child):
    """A child that goes on counting after its prompt."""

    async def ask(self, request):
        for number in range(request["new_tokens"]):
            yield {"piece": f"{request['prompt']}{number};"}
        yield {"done": True}


def test_the_fallback_goes_on_after_what_was_said(tmp_path):
    release, fallback = Dying("release", {}, 5), Steady("fallback", {}, 5)
    release.facts = fallback.facts = {"fallback": False}

    async def answer():
        for child in (release, fallback):
            child.ready.set()
        router = Router(release, fallback, tmp_path, "cpu", None, None)
        outcome = Outcome(*router.deal(Ask("k", {})))
        ask = Ask("k", {"prompt": "p", "new_tokens": 3})
        return [piece async for piece in router.answer(ask, outcome)], outcome, router.metrics()

    pieces, outcome, metrics = asyncio.run(answer())
    assert pieces == ["a", "b", "pab0;"]
    assert (outcome.arm, outcome.served_by, outcome.error, outcome.why) == (
        "release",
        "fallback",
        True,
        "gone",
    )
    assert outcome.fallback_ms is not None
    assert 'absorb_requests_total{arm="release",served_by="fallback",outcome="failed over"} 1' in metrics


def begun(tmp_path):
    """The folder of a release, as far as a router looks at it, a rollout of it, and who signs its steps."""
    new_key(tmp_path / "ops")
    signer, root, folder = private_key(tmp_path / "ops"), tmp_path / "release", tmp_path / "rollout"
    root.mkdir()
    folder.mkdir()
    (root / "manifest.json").write_text("{}")
    about = {"stage": 1, "time": now(), "reason": "new"}
    state = chain.State(
        release=file_sha256(root / "manifest.json"), contract="c", owner="o", target="cpu", status="running",
        step=1, plan=Plan.model_validate(PLAN), **about,
    )  # fmt: skip
    first = chain.Step(
        number=1, previous=None, by="Ada", public_key=signer.public_key.keyval["public"], decision="START",
        by_hand=True, state=state, **about,
    )  # fmt: skip
    chain.append_step(folder, first, signer)
    return root, folder


def step_of(folder, path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--rollout", folder, "--log", path, "--by", "Ada", "--key", folder.parent / "ops"]
    return rollout.step(given("step", *words))


def test_a_release_that_is_off_keeps_its_requests_and_their_log_is_accepted(tmp_path):
    """A step writes its line before its state: a router that looks between the two trusts neither."""
    root, folder = begun(tmp_path)
    children = Steady("release", {}, 5), Steady("fallback", {}, 5)
    router = Router(*children, root, "cpu", folder, tmp_path / "ops.pub")
    assert router.deal(Ask("k", {})) == ("outside", 0), "before anything was read"
    router.read_rollout()
    assert (router.off, router.state.step) == ("", 1)
    before = (folder / "rollout.json").read_bytes()
    plan = router.state.plan
    rows = [{"key": f"k{i}", "stage": 1, "arm": arm_of(plan, 1, f"k{i}"), "time": now()} for i in range(20)]
    step_of(folder, tmp_path / "1.jsonl", rows)
    after = (folder / "rollout.json").read_bytes()
    (folder / "rollout.json").write_bytes(before)
    router.read_rollout()
    assert "is not what the last line of log.jsonl says" in router.off
    log = Log(tmp_path / "log.jsonl")
    for number in range(20):
        ask = Ask(f"n{number}", {"prompt": "p", "new_tokens": 2})
        log.write(ask, run_through(router, ask, Outcome(*router.deal(ask))))
    log.stream.close()
    written = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {row["served_by"] for row in written} == {"fallback"}
    assert {row["arm"] for row in written} == {"release", "fallback"}
    assert all(row["error"] == (row["arm"] == "release") for row in written)
    (folder / "rollout.json").write_bytes(after)
    step = step_of(folder, tmp_path / "2.jsonl", written)
    assert step.sums["release"].errors == step.sums["release"].requests > 0
    assert step.sums["fallback"].errors == 0
    router.read_rollout()
    assert (router.off, router.state.step) == ("", 3)


def run_through(router, ask, outcome):
    """What became of a request with both processes there."""

    async def answer():
        for child in router.children.values():
            child.facts = {"fallback": False}
            child.ready.set()
        _ = [piece async for piece in router.answer(ask, outcome)]

    asyncio.run(answer())
    return outcome


def served_by_hand(tmp_path, ready):
    """A server without HTTP: `ready` names the processes that are there."""
    children = [(Steady if name in ready else Child)(name, {}, 0.1) for name in ("release", "fallback")]
    for child in children:
        child.facts = {"fallback": False}
        if child.name in ready:
            child.ready.set()
    router = Router(*children, tmp_path, "cpu", None, None)
    return Server(router, Log(tmp_path / "log.jsonl"), 8, 60)


def test_what_a_client_did_not_wait_for_is_an_error_with_its_time_so_far(tmp_path):
    async def leave():
        server = served_by_hand(tmp_path, ("release", "fallback"))
        lines = server.lines(*server.ask(Generate(prompt="p"), prompt="p", new_tokens=9))
        assert "text" in json.loads(await anext(lines))
        await asyncio.sleep(0.05)
        await lines.aclose()
        assert server.router.in_flight == 0
        server.log.stream.close()
        return server.router.metrics()

    metrics = asyncio.run(leave())
    (row,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert (row["arm"], row["served_by"], row["error"]) == ("release", "", True)
    assert row["why"].startswith("the client gave up")
    assert 50 <= row["latency_ms"] < 5000
    assert 'absorb_requests_total{arm="release",served_by="nobody",outcome="not answered"} 1' in metrics


def test_without_any_process_a_request_is_told_to_come_again_and_logged(tmp_path):
    async def ask():
        server = served_by_hand(tmp_path, ())
        body = Generate(prompt="p")
        with pytest.raises(HTTPException) as error:
            await server.generate(body)
        parts = server.ask(body, prompt="p", new_tokens=2)
        lines = [json.loads(line) async for line in server.lines(*parts)]
        server.log.stream.close()
        return error.value, lines

    error, lines = asyncio.run(ask())
    assert (error.status_code, error.headers) == (503, {"Retry-After": "1"})
    assert lines == [{"error": "the fallback was not ready for 0.1 s"}]
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["served_by"], row["error"]) for row in rows] == [("", True)] * 2


@pytest.mark.parametrize("odd", ["print('hello')", "print('[' * 9000000)", "print('{}')"])
def test_a_child_that_says_what_is_no_message_is_started_again(tmp_path, odd):
    """A real process: the first one says something odd and stays, the second one behaves."""
    program = (
        "import json, sys, time, pathlib\n"
        f"mark = pathlib.Path({str(tmp_path / 'mark')!r})\n"
        "print(json.dumps({'ready': True, 'fallback': False}), flush=True)\n"
        "if not mark.exists():\n"
        "    mark.touch()\n"
        f"    {odd}\n"
        "    sys.stdout.flush()\n"
        "    time.sleep(600)\n"
        "time.sleep(600)\n"
    )

    async def live():
        child = Child("release", {}, 30)
        child.words = [sys.executable, "-c", program]
        task = asyncio.create_task(child.supervise())
        async with asyncio.timeout(20):
            while child.starts < 2 or not child.ready.is_set():
                await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), 20)
        return child

    assert asyncio.run(live()).process.returncode is not None


def test_a_child_that_dies_is_told_to_who_waits_and_is_started_again():
    """A real process in place of the model: it dies at the word `die`."""
    program = (
        "import json, sys\n"
        "print(json.dumps({'ready': True, 'fallback': False}), flush=True)\n"
        "for line in sys.stdin:\n"
        "    asked = json.loads(line)\n"
        "    if asked['prompt'] == 'die': sys.exit(1)\n"
        "    print(json.dumps({'id': asked['id'], 'done': True}), flush=True)\n"
    )

    async def live():
        child = Child("release", {}, 30)
        child.words = [sys.executable, "-c", program]
        task = asyncio.create_task(child.supervise())
        await asyncio.wait_for(child.ready.wait(), 30)
        said = [message async for message in child.ask({"prompt": "hello"})]
        with pytest.raises(RuntimeError, match="release ended"):
            _ = [message async for message in child.ask({"prompt": "die"})]
        await asyncio.wait_for(child.ready.wait(), 30)
        again = [message async for message in child.ask({"prompt": "hello"})]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return said, again, child

    said, again, child = asyncio.run(live())
    assert said == again == [{"done": True}]
    assert child.starts == 2
    assert child.process.returncode is not None, "it does not outlive its server"
